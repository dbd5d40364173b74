"""Several processes, with the variables of the example configurations, as far as a CPU allows."""

import json
import shutil
from pathlib import Path

import launched_runs
import pytest
import torch
import yaml
from accelerate import debug_launcher
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from image_sets import class_files, write_files
from safetensors.torch import load_file
from subject_runs import FLAGS, PROMPT, are_equal, interrupted, parameters

from pipelines.subject.adapters import load_adapter
from training import fewshot_nora
from training.options import parse_options
from training.options.fewshot import parse_fewshot_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
MORE = "--target_modules to_v to_q --train_text_encoder --stop_text_encoder_training 2 --lr_scheduler constant"


def environment(config, folder):
    """The variables that `accelerate launch` sets for the configuration called `config`, here for processes on the CPU."""
    values = yaml.safe_load((CONFIGS / config).read_text()) | {"mixed_precision": "no", "use_cpu": True}
    (folder / config).write_text(yaml.safe_dump(values))
    given = launch_command_parser().parse_args(["--config_file", str(folder / config), "script.py"])
    variables = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def in_two_processes(runs):
    """Do `runs` in two processes that `debug_launcher` forks from this one."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    launched_runs.main(runs)


def assert_close(actual, expected, atol=1e-4):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol)


@pytest.fixture
def subject_flags(tiny_model, images_dir):
    """The flags of a subject's run, of two processes with a batch of 2 or of one with 4."""

    def flags(folder, *more, batch=2):
        places = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(images_dir)]
        places += ["--instance_prompt", PROMPT, "--validation_prompt", PROMPT, "--output_dir", str(folder)]
        return [*FLAGS.split(), *MORE.split(), *places, "--train_batch_size", str(batch), *more]

    return flags


@pytest.fixture
def alone(trainer):
    """Runs the subject's trainer in this process."""

    def run(flags):
        return trainer.main(parse_options(flags))

    return run


@pytest.mark.slow(40)
def test_two_processes_train_the_same_adapter_as_one_with_the_same_global_batch(subject_flags, alone, random_clip, tmp_path):
    folders = write_files(tmp_path / "classes", class_files({"cats": 6, "dogs": 6}))
    flags = "--shots 2 --seeds 0 --method zeroshot nora --rank 4 --inner_r 2 --min_train_steps 4 --iterations_per_shot 1"
    given = [*flags.split(), "--report_to", "none", "--model", str(random_clip), "--data_dir", str(folders)]
    classes = {
        name: [*given, "--train_batch_size", str(batch), "--output_dir", str(tmp_path / f"classes-{name}")]
        for name, batch in (("one", 4), ("two", 2))
    }
    debug_launcher(in_two_processes, ([["subject", *subject_flags(tmp_path / "two")], ["fewshot", *classes["two"]]],))
    two, one = RunDirectory(tmp_path / "two"), alone(subject_flags(tmp_path / "one", batch=4))
    assert (two.status().processes, one.status().processes) == (2, 1)
    statistics = [load_file(run.path / "calibration" / "unet.safetensors") for run in (one, two)]
    for name, value in statistics[0].items():
        # A forward pass of another batch size rounds differently.
        torch.testing.assert_close(statistics[1][name], value, rtol=1e-5, atol=0)
    assert_close(parameters(two), parameters(one))
    halfway, whole = parameters(two, 0), parameters(two)
    still = {name for name, value in whole.items() if torch.equal(value, halfway[name])}
    assert still == {name for name in whole if name.startswith("text_encoders.")}

    AcceleratorState._reset_state(reset_partial_state=True)
    fewshot_nora.main(parse_fewshot_options(classes["one"]))
    runs = [RunDirectory(tmp_path / f"classes-{name}") for name in classes]
    trials = [RunDirectory(run.path / "trials" / "2-shots" / "seed-0" / "nora") for run in runs]
    assert_close(*map(parameters, trials), atol=1e-5)
    reports = [json.loads((run.path / "report.json").read_text())["trials"] for run in runs]
    assert [one["test"]["confusion"] for one in reports[0]] == [one["test"]["confusion"] for one in reports[1]]


MEASURED = ["--heldout_image", "2.png", "--use_ema", "--ema_decay", "0.5"]
RESUME = ["--resume_from_checkpoint", "latest"]
DORA = "--method dora --rank 1 --target_modules to_q conv1 proj_in --max_train_steps 2 --heldout_steps 1"


@pytest.mark.slow(50)
def test_two_processes_with_fsdp_train_the_same_adapter_as_one_and_their_run_resumes_without_fsdp(
    subject_flags, alone, pipe, tmp_path, monkeypatch
):
    """With FSDP: a run, the same one in two parts, and one of a method of PEFT of rank 1."""
    whole = subject_flags(tmp_path / "whole", *MEASURED)
    begin = subject_flags(tmp_path / "parts", *MEASURED, "--max_train_steps", "2")
    go_on = [*subject_flags(tmp_path / "parts", *MEASURED), *RESUME]
    dora = {name: subject_flags(tmp_path / f"dora-{name}", *DORA.split(), batch=size) for name, size in (("one", 4), ("two", 2))}
    runs = [["subject", *flags] for flags in (whole, begin, go_on, dora["two"])]
    for name, value in environment("fsdp.yaml", tmp_path).items():
        monkeypatch.setenv(name, value)
    debug_launcher(in_two_processes, (runs,))
    monkeypatch.undo()

    split, one = RunDirectory(tmp_path / "whole"), alone(subject_flags(tmp_path / "one", *MEASURED, batch=4))
    assert_same_run(split, one)
    assert are_equal(parameters(RunDirectory(tmp_path / "parts")), parameters(split))
    load_adapter(pipe, split.path, "learned")
    assert pipe.unet.active_adapters() == ["learned"]

    alone(dora["one"])
    two, one = (RunDirectory(tmp_path / f"dora-{name}") for name in ("two", "one"))
    assert_close(parameters(two), parameters(one))
    kept = "adapters/step-0000001/full/unet/adapter_model.safetensors"
    assert_close(load_file(two.path / kept), load_file(one.path / kept))

    interrupted(split, tmp_path / "without")
    shutil.copytree(split.path / "adapters", tmp_path / "without" / "adapters")
    debug_launcher(in_two_processes, ([["subject", *subject_flags(tmp_path / "without", *MEASURED), *RESUME]],))
    resumed = RunDirectory(tmp_path / "without")
    assert len(resumed.metrics()) == len(split.metrics())
    assert_close(parameters(resumed), parameters(split), atol=1e-6)


def assert_same_run(split, one):
    """Whether a run of several processes left what that of one did."""
    for checkpoint in (0, 1):
        assert_close(parameters(split, checkpoint), parameters(one, checkpoint))
        states = [torch.load(list_checkpoints(run.checkpoints)[checkpoint] / "state.pt") for run in (split, one)]
        # `assert_close` compares no strings.
        decompositions = [state["method"].pop("decomposition") for state in states]
        assert decompositions[0] == decompositions[1]
        torch.testing.assert_close(*states, rtol=0, atol=1e-4)
    for name in ("loss", "heldout_loss", "seen_loss", "subject_score"):
        curves = [[line.values[name] for line in run.metrics() if name in line.values] for run in (split, one)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    files = [{str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.suffix != ".png"} for run in (split, one)]
    assert {
        name for name in files[0] ^ files[1] if f"/{split.path.name}" not in name and f"/{one.path.name}" not in name
    } == set()
    lora = "diffusers/pytorch_lora_weights.safetensors"
    assert_close(load_file(split.path / lora), load_file(one.path / lora))


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_example_configurations_are_valid_and_name_the_command_that_uses_them(config):
    first = (CONFIGS / config).read_text().splitlines()[0]
    assert first == f"# accelerate launch --config_file training/configs/{config} training/dreambooth_nora.py"
    processes = {"default.yaml": 1, "one_gpu.yaml": 1}.get(config, 2)
    assert load_config_from_file(str(CONFIGS / config)).num_processes == processes
