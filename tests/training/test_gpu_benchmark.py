"""The benchmark for a GPU, on tiny models: its measurements, its table, its time limit, and the packages that it is given."""

import os
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_steps
import pytest
import torch
from accelerate.state import AcceleratorState

SHELL_PROGRAM = Path(gpu.__file__).with_suffix(".sh")
TINY = ["--tiny", "--repeats", "1"]


def cells(line):
    """The cells of a row."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.slow(20)
def test_every_step_measures_tiny_models_and_the_file_has_all_rows(monkeypatch, tmp_path, capsys):
    def in_this_process(step, arguments, seconds):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield from gpu_steps.STEPS[step](gpu.parsed([*arguments, "--steps", step]))
        except ValueError as error:
            yield gpu.row(step, "failed", note=str(error))

    assert gpu_steps.STEPS.keys() == gpu.SHARES.keys()
    monkeypatch.setattr(gpu, "rows_of", in_this_process)
    output = tmp_path / "gpu.md"
    gpu.main([*TINY, "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in text
    rows = [cells(line) for line in text.partition(gpu.HEAD)[2].splitlines()]
    assert {len(row) for row in rows} == {len(cells(gpu.HEAD.splitlines()[0]))}
    measured = {row[0] for row in rows if row[2] and float(row[2]) > 0}
    assert measured == gpu.SHARES.keys() - {"diffusers"}
    assert [row[4] for row in rows if not row[2]] == [
        "--diffusers_script must name diffusers' train_dreambooth_lora_sdxl.py, and was not given."
    ]


def test_methods_train_on_one_set_of_frozen_weights():
    options = gpu.parsed(TINY)
    base = gpu_steps.base_model(options)
    subject = gpu_steps.random_subject(base, 32)
    frozen = {parameter.data_ptr(): parameter.clone() for parameter in base.unet.parameters()}
    AcceleratorState._reset_state(reset_partial_state=True)
    with ExitStack() as context:
        for method in gpu_steps.METHODS.values():
            adapter = gpu_steps.adapter_options(options, method)
            training = gpu_steps.AdapterTraining(context, base, adapter, subject, "bf16", False, None)
            parameters = list(training.loss.unet.parameters())
            assert {parameter.data_ptr() for parameter in parameters} > frozen.keys()
            assert not {parameter.data_ptr() for parameter in parameters if parameter.requires_grad} & frozen.keys()
            assert not hasattr(base.unet, "peft_config")
    assert all(torch.equal(frozen[parameter.data_ptr()], parameter) for parameter in base.unet.parameters())


def test_a_measurement_that_does_not_fit_into_memory_is_a_row_with_the_reason():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate | 20 GiB.")

    assert gpu_steps.attempted("bf16", "1024 px", too_large) == [
        "| bf16 | 1024 px |  |  | OutOfMemoryError: CUDA out of memory. Tried to allocate / 20 GiB. |"
    ]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Replace the program of the steps by a script."""

    def replace(source):
        script = tmp_path / "steps.py"
        script.write_text(source)
        monkeypatch.setattr(gpu, "STEPS_PROGRAM", script)

    return replace


def test_a_step_that_fails_keeps_its_rows_and_adds_the_reason(program):
    program(
        "import atexit, sys\n"
        "atexit.register(sys.stderr.write, 'a warning at the end')\n"
        "print('noise')\n"
        "print('| nf4 | a | 1.0 | | |', flush=True)\n"
        "raise RuntimeError('no kernel for nf4')\n"
    )
    failed = gpu.row("nf4", "failed", note="RuntimeError: no kernel for nf4")
    assert list(gpu.rows_of("nf4", [], 60)) == ["| nf4 | a | 1.0 | | |", failed]


def test_a_step_that_exceeds_its_time_is_stopped_with_all_processes_that_it_started(program):
    # The process that it starts has its standard output, whose end is waited for.
    program(
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('| nf4 | a | 1.0 | | |', flush=True)\n"
        "time.sleep(600)\n"
    )
    assert list(gpu.rows_of("nf4", [], 2))[-1] == gpu.row("nf4", "stopped", note="its 2 s were over")


@pytest.mark.parametrize("used", [1.0, 0.0])
def test_the_time_is_shared_so_that_all_steps_get_some_and_none_ends_too_late(used, monkeypatch, tmp_path):
    now, limits = 0.0, {}

    def rows_of(step, arguments, seconds):
        nonlocal now
        now += used * seconds
        limits[step] = seconds
        yield gpu.row(step, "")

    monkeypatch.setattr(gpu, "rows_of", rows_of)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now))
    gpu.main(["--minutes", "8", "--output", str(tmp_path / "gpu.md")])
    assert list(limits) == list(gpu.SHARES)
    assert min(limits.values()) > 0
    assert now == pytest.approx(480 * used)
    assert limits["pretraining"] == pytest.approx(
        480 if used == 0 else 480 * gpu.SHARES["pretraining"] / sum(gpu.SHARES.values())
    )


def test_the_packages_of_a_folder_of_wheels_come_before_those_of_the_machine(tmp_path):
    """`python3` is one that installs as it is told, and says what it would run."""
    name, wheels, programs = "diffusers-999-py3-none-any.whl", tmp_path / "wheels", tmp_path / "bin"
    wheels.mkdir()
    programs.mkdir()
    with zipfile.ZipFile(wheels / name, "w") as wheel:
        wheel.writestr("diffusers/__init__.py", "")
        wheel.writestr("diffusers-999.dist-info/METADATA", "Metadata-Version: 2.1\nName: diffusers\nVersion: 999\n")
        wheel.writestr("diffusers-999.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("diffusers-999.dist-info/RECORD", "")
    report = "import sys, importlib.metadata; print(importlib.metadata.version('diffusers'), sys.argv)"
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exec {sys.executable} "$@"\nexec {sys.executable} -c "{report}" "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(SHELL_PROGRAM), "--wheels", str(wheels), "--minutes", "1"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed == f"999 ['-c', '{SHELL_PROGRAM.with_suffix('.py')}', '--minutes', '1']\n"
