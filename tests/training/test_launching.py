"""Several processes, started as the README and the example configurations say, as far as a CPU allows."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from picture_sets import class_files, write_files
from safetensors.torch import load_file

from pipelines.subject.adapters import load_adapter
from training import dreambooth_nora
from training.options import parse_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
FLAGS = shlex.split("""
--instance_prompt sks --heldout_image none --rank 6 --inner_r 2 --target_modules to_v to_q --train_text_encoder
--max_train_steps 10 --checkpointing_steps 10 --validation_steps 10 --validation_prompt sks --certify false --report_to none
""")


def launched(config, arguments, script=ROOT / "training" / "dreambooth_nora.py"):
    """Start the trainer with a configuration, on the CPU; returns the run's directory, the last of the arguments."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    own = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += [str(script), *arguments]
    finished = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return RunDirectory(Path(arguments[-1]))


def numbers(run, checkpoint=-1):
    return load_file(list_checkpoints(run.checkpoints)[checkpoint] / "trained.safetensors")


def assert_close(actual, expected, atol=1e-4):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """An example configuration with what only a GPU has rewritten."""
    folder = tmp_path_factory.mktemp("configs")

    def rewritten(name):
        config = yaml.safe_load((CONFIGS / name).read_text())
        config |= {"mixed_precision": "no", "main_process_port": 0}
        (folder / name).write_text(yaml.safe_dump(config))
        return folder / name

    return rewritten


@pytest.fixture(scope="module")
def places(tiny_model, pictures_dir):
    return ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]


@pytest.fixture
def alone(places, monkeypatch):
    """Runs the trainer in this process, with pictures for all that two processes have."""

    def run(flags, folder):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        given = [*flags, *places, "--train_batch_size", "4", "--output_dir", str(folder)]
        return dreambooth_nora.main(parse_options(given))

    return run


@pytest.mark.slow
def test_two_processes_learn_what_one_does_at_the_same_global_batch(places, tmp_path, on_cpu):
    runs = []
    for config, batch, processes in (("one_gpu.yaml", 4, 1), ("multi_gpu.yaml", 2, 2)):
        folder = tmp_path / config.removesuffix(".yaml")
        runs.append(launched(on_cpu(config), [*FLAGS, *places, "--train_batch_size", str(batch), "--output_dir", str(folder)]))
        assert runs[-1].status()["processes"] == processes
    statistics = [load_file(run.path / "calibration" / "unet.safetensors") for run in runs]
    for name, value in statistics[0].items():
        # A forward pass of another batch size rounds differently.
        torch.testing.assert_close(statistics[1][name], value, rtol=1e-5, atol=0)
    assert_close(*map(numbers, reversed(runs)))


@pytest.mark.slow
def test_two_processes_stop_training_text_encoders_as_one_does(places, alone, tmp_path, on_cpu):
    flags = [*FLAGS, "--max_train_steps", "4", "--checkpointing_steps", "2", "--stop_text_encoder_training", "2"]
    given = [*flags, *places, "--train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    two, one = launched(on_cpu("multi_gpu.yaml"), given), alone(flags, tmp_path / "one")
    assert_close(numbers(two), numbers(one))
    halfway, whole = numbers(two, 0), numbers(two)
    still = {name for name, value in whole.items() if torch.equal(value, halfway[name])}
    assert still == {name for name in whole if name.startswith("text_encoders.")}


FSDP_FLAGS = [*FLAGS, "--heldout_image", "2.png", "--heldout_steps", "5", "--validation_steps", "5", "--checkpointing_steps", "5"]
FSDP_FLAGS += ["--use_ema", "--ema_decay", "0.5", "--stop_text_encoder_training", "5"]
FSDP_ON_CPU = Path(__file__).with_name("fsdp_on_cpu.py")


@pytest.fixture(scope="module")
def split(places, tmp_path_factory, on_cpu):
    """A run of two processes with FSDP."""
    folder = tmp_path_factory.mktemp("fsdp") / "run"
    given = [*FSDP_FLAGS, *places, "--train_batch_size", "2", "--output_dir", str(folder)]
    return launched(on_cpu("fsdp.yaml"), given, FSDP_ON_CPU)


@pytest.mark.slow
def test_two_processes_with_fsdp_learn_and_write_what_one_does(split, alone, pipe, tmp_path):
    one = alone(FSDP_FLAGS, tmp_path / "one")
    for checkpoint in (0, 1):
        assert_close(numbers(split, checkpoint), numbers(one, checkpoint))
        states = [torch.load(list_checkpoints(run.checkpoints)[checkpoint] / "state.pt") for run in (split, one)]
        torch.testing.assert_close(*states, rtol=0, atol=1e-4)
    for name in ("loss", "heldout_loss", "seen_loss", "subject_score"):
        curves = [[line[name] for line in run.metrics() if name in line] for run in (split, one)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    files = [{str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.suffix != ".png"} for run in (split, one)]
    assert {name for name in files[0] ^ files[1] if "/one" not in name and "/run" not in name} == set()
    lora = "diffusers/pytorch_lora_weights.safetensors"
    assert_close(load_file(split.path / lora), load_file(one.path / lora))
    load_adapter(pipe, split.path, "learned")
    assert pipe.unet.active_adapters() == ["learned"]


@pytest.mark.slow
def test_fsdp_trains_methods_of_peft_whatever_their_rank(places, alone, tmp_path, on_cpu):
    more = (
        "--method dora --rank 1 --target_modules to_q conv1 proj_in --max_train_steps 2 --heldout_steps 1 --checkpointing_steps 2"
    )
    flags = [*FLAGS, *more.split()]
    given = [*flags, *places, "--train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    two, one = launched(on_cpu("fsdp.yaml"), given, FSDP_ON_CPU), alone(flags, tmp_path / "one")
    assert_close(numbers(two), numbers(one))
    kept = "adapters/step-0000001/full/unet/adapter_model.safetensors"
    assert_close(load_file(two.path / kept), load_file(one.path / kept))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "atol"), [("fsdp.yaml", 0), ("multi_gpu.yaml", 1e-6)])
def test_what_fsdp_has_begun_goes_on_with_it_or_without(split, places, tmp_path, on_cpu, config, atol):
    shutil.copytree(split.path, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    script = [FSDP_ON_CPU] if config == "fsdp.yaml" else []
    given = [*FSDP_FLAGS, *places, "--train_batch_size", "2", "--resume_from_checkpoint", "latest"]
    resumed = launched(on_cpu(config), [*given, "--output_dir", str(tmp_path / "run")], *script)
    assert len(resumed.metrics()) == len(split.metrics())
    assert_close(numbers(resumed), numbers(split), atol)


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_an_example_configuration_names_the_command_that_uses_it(config):
    first = (CONFIGS / config).read_text().splitlines()[0]
    assert first == f"# accelerate launch --config_file training/configs/{config} training/dreambooth_nora.py"


@pytest.mark.slow
def test_two_processes_fit_the_classifier_that_one_does(random_clip, tmp_path, on_cpu):
    folders = write_files(tmp_path / "classes", class_files({"cats": 6, "dogs": 6}))
    flags = "--shots 2 --seeds 0 --method zeroshot nora --rank 4 --inner_r 2 --min_train_steps 4 --iterations_per_shot 1"
    given = [*flags.split(), "--report_to", "none", "--model", str(random_clip), "--data_dir", str(folders)]
    runs = []
    for config, batch in (("one_gpu.yaml", 4), ("multi_gpu.yaml", 2)):
        own = [*given, "--train_batch_size", str(batch), "--output_dir", str(tmp_path / config.removesuffix(".yaml"))]
        runs.append(launched(on_cpu(config), own, ROOT / "training" / "fewshot_nora.py"))
    members = [RunDirectory(run.path / "members" / "2-shots" / "seed-0" / "nora") for run in runs]
    assert_close(*map(numbers, reversed(members)), atol=1e-5)
    reports = [json.loads((run.path / "report.json").read_text())["members"] for run in runs]
    assert [one["test"]["confusion"] for one in reports[0]] == [one["test"]["confusion"] for one in reports[1]]
