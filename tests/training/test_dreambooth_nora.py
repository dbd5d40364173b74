"""The subject trainer, whole, on a tiny random model; and its default command on the built-in one."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import tiny_pipeline

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.pictures import read_settings
from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.options import parse_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.subject import samples

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "subjects" / "robot_toy"
PROMPT = "sks toy"
FAST = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 4 --train_batch_size 2 --lr_warmup_steps 1"
FAST += " --checkpointing_steps 2 --validation_steps 2 --heldout_image none --heldout_steps 2 --no_certify"


def flags(tiny_model, pictures_dir, folder, *more):
    return [
        *FAST.split(),
        *("--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)),
        *("--instance_prompt", PROMPT, "--validation_prompt", PROMPT, "snow", "--output_dir", str(folder)),
        *more,
    ]


@pytest.fixture(autouse=True)
def two_inference_steps(monkeypatch):
    """Random models draw no better in 25 steps."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))


@pytest.fixture(autouse=True)
def any_precision():
    """accelerate keeps the precision of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trained(tiny_model, pictures_dir, tmp_path):
    """Runs the trainer with the flags given, in a folder of that name."""

    def run(name, *more):
        return dreambooth_nora.main(parse_options(flags(tiny_model, pictures_dir, tmp_path / name, *more)))

    return run


def trained_numbers(run):
    return load_file(list_checkpoints(run.checkpoints)[-1] / "trained.safetensors")


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_run_directory_holds_everything_and_says_how_it_went(trained, method):
    run = trained("run", "--method", method, "--heldout_image", "2.png")
    files = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    expected = {"options.json", "command", "status.json", "metrics.jsonl", "README.md", "before_after.png"}
    expected |= {"provenance.json", "suggestion.json"}
    expected |= {"samples/step-0000002.png", "samples/step-0000004.png", "diffusers/pytorch_lora_weights.safetensors"}
    expected |= {"kohya/run.safetensors", "adapter/full/unet/adapter_config.json"}
    assert expected <= files
    assert ("adapter/compact/unet/adapter_model.safetensors" in files) == (method == "nora")
    status = run.status()
    assert (status["state"], status["phase"], status["step"], status["total"]) == ("done", "done", 4, 4)
    assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in run.metrics() if "heldout_loss" in line] == [0, 2, 4]
    assert json.loads((run.path / "options.json").read_text())["adapter"]["method"] == method
    assert "before_after.png" in (run.path / "README.md").read_text()


def test_every_sample_is_kept_with_its_settings_beside_what_the_base_model_drew_and_the_subject(trained):
    run = trained("run", "--seed", "5", "--validation_prompt", "toy in snow", "toy at night")
    assert sorted(path.name for path in run.samples.iterdir() if path.is_dir()) == [
        *(f"step-000000{step}" for step in (0, 2, 4)),
        "subject",
    ]
    assert len(list(run.subject.iterdir())) == 3
    for step in (0, 2, 4):
        said = [read_settings(run.samples_at(step) / f"{place}.png") for place in range(2)]
        told = [(each["prompt"], each["seed"], each["step"]) for each in said]
        assert told == [("toy in snow", 5, step), ("toy at night", 6, step)]
        assert Path(said[0]["model"]).is_dir()


def test_phases_are_named_in_their_order(trained, monkeypatch):
    phases = []
    update = RunDirectory.update_status

    def watched(run, **fields):
        if fields.get("phase") and fields["phase"] not in phases:
            phases.append(fields["phase"])
        update(run, **fields)

    monkeypatch.setattr(RunDirectory, "update_status", watched)
    trained("run")
    assert phases == ["loading", "encoding", "calibrating", "dry run", "training", "exporting", "done"]


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_the_same_flags_give_the_same_bytes(trained, method):
    first, second = (trained(name, "--method", method, "--dropout", "0.1", "--random_flip") for name in "ab")
    for file in ("diffusers/pytorch_lora_weights.safetensors", "before_after.png", "adapter/full/unet/adapter_model.safetensors"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes()


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_run_stopped_and_resumed_is_the_run_that_was_not(trained, method, monkeypatch):
    more = ("--method", method, "--train_text_encoder", "--inner_init", "gaussian", "--preserve_output")
    whole = trained("whole", *more)
    at = dreambooth_nora.SubjectBatches.__call__

    def stop(batches, index):
        if index == 3:
            raise KeyboardInterrupt
        return at(batches, index)

    monkeypatch.setattr(dreambooth_nora.SubjectBatches, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained("halves", *more)
    assert RunDirectory(whole.path.parent / "halves").status()["state"] == "stopped"
    monkeypatch.setattr(dreambooth_nora.SubjectBatches, "__call__", at)
    halves = trained("halves", *more, "--resume_from_checkpoint", "latest")
    for file in ("unet", "text_encoder", "text_encoder_2"):
        path = f"adapter/full/{file}/adapter_model.safetensors"
        assert (whole.path / path).read_bytes() == (halves.path / path).read_bytes()


def test_every_way_of_computing_a_step_gives_the_same_adapter(trained):
    expected = trained_numbers(trained("plain"))
    for name, more in {"checkpointing": ["--gradient_checkpointing"], "explicit": ["--mixed_precision", "no"]}.items():
        for key, value in trained_numbers(trained(name, *more)).items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_half_precision_trains_the_adapter_in_float32(trained, method):
    run = trained("half", "--method", method, "--mixed_precision", "bf16")
    assert all(value.dtype == torch.float32 for value in trained_numbers(run).values())
    assert run.status()["state"] == "done"


@pytest.fixture
def training_alone(monkeypatch):
    """Leave out all that comes after training, and the pictures."""
    picture = Image.new("RGB", (16, 16))
    monkeypatch.setattr(samples, "generate", lambda pipeline, prompts, *_: [picture] * len(prompts))
    monkeypatch.setattr(dreambooth_nora.adapters, "save_everywhere", lambda *_: None)


@pytest.fixture(scope="module")
def baseline(tiny_model, pictures_dir, tmp_path_factory):
    """What the flags of `FAST` learn."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    return trained_numbers(dreambooth_nora.main(parse_options(flags(tiny_model, pictures_dir, folder))))


@pytest.mark.parametrize(
    "more",
    [
        ["--snr_gamma", "0.1"],
        ["--learning_rate", "0.01"],
        ["--lr_scheduler", "linear"],
        ["--lr_warmup_steps", "3"],
        ["--adam_beta1", "0.5"],
        ["--adam_beta2", "0.5"],
        ["--adam_weight_decay", "0.5"],
        ["--adam_epsilon", "1e-3"],
        ["--max_grad_norm", "1e-4"],
        ["--gradient_accumulation_steps", "2"],
        ["--seed", "1"],
        ["--random_flip"],
        ["--resolution", "24"],
        ["--size_conditioning", "target"],
        ["--alpha", "4"],
        ["--dropout", "0.5"],
        ["--inner_init", "gaussian"],
        ["--heldout_image", "2.png"],
    ],
    ids=lambda more: more[0].removeprefix("--"),
)
def test_every_flag_of_training_changes_what_is_learned(trained, more, training_alone, baseline):
    changed = trained_numbers(trained("changed", *more))
    assert any(not torch.equal(changed[name], value) for name, value in baseline.items())


def test_target_modules_say_what_is_adapted(trained):
    run = trained("run", "--target_modules", "to_q", "ff.net.2")
    assert {name.rsplit(".nora", 1)[0].rsplit("attn", 1)[-1][2:] for name in trained_numbers(run) if "attn" in name} == {"to_q"}
    assert any("ff.net.2" in name for name in trained_numbers(run))


def test_pictures_after_training_are_those_of_the_stock_pipeline(trained, monkeypatch):
    drawn = []
    generate = samples.generate

    def remembered(*arguments):
        pictures = list(generate(*arguments))
        drawn.append(pictures)
        return pictures

    monkeypatch.setattr(samples, "generate", remembered)
    run = trained("run", "--learning_rate", "0.1", "--train_text_encoder")
    stock = tiny_pipeline()
    stock.load_lora_weights(run.path / "diffusers")
    picture = stock(
        PROMPT, num_inference_steps=2, guidance_scale=4.0, height=16, width=16, generator=torch.Generator().manual_seed(0)
    ).images[0]
    # Before, of two steps of the training, after; then those of the suggested step, where that is another.
    before, _, _, after = (pictures[0] for pictures in drawn[:4])
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(after)).max() <= 1
    assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() > 1


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        ("nothing", [], r"holds no picture"),
        ("broken", [], r"(?s)no picture that can be used.*broken\.png.* cannot be read"),
        ("good", ["--heldout_image", "z.png"], r"heldout_image must be auto, none, .* or one of good\.png, got 'z\.png'"),
        ("good", ["--heldout_image", "good.png"], r"holds one picture, and it is held out"),
        ("good", ["--rank", "500"], r"r must be in .*got 500"),
        ("good", ["--pretrained_model_name_or_path", "./nowhere"], r"no model './nowhere'"),
    ],
)
def test_bad_input_is_named_before_training(tiny_model, tmp_path, prepare, more, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if prepare == "good":
        Image.new("RGB", (20, 20)).save(folder / "good.png")
    if prepare == "broken":
        (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=message):
        dreambooth_nora.main(parse_options(flags(tiny_model, folder, tmp_path / "run", *more)))
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_bad_picture_is_left_out_and_named_in_the_run(tiny_model, pictures_dir, tmp_path, training_alone):
    shutil.copytree(pictures_dir, tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    whole, mended = (
        dreambooth_nora.main(parse_options(flags(tiny_model, folder, tmp_path / name)))
        for name, folder in {"whole": pictures_dir, "mended": tmp_path / "pictures"}.items()
    )
    entries = json.loads((mended.path / "photos.json").read_text())["pictures"]
    verdicts = {Path(entry["path"]).name: entry["verdict"] for entry in entries}
    assert verdicts.pop("broken.png") == "left out"
    assert "left out" not in verdicts.values()
    expected = trained_numbers(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained_numbers(mended).items())


def test_a_run_is_never_overwritten(trained):
    trained("run")
    with pytest.raises(InputError, match=r"holds a run.*another --output_dir.*--resume_from_checkpoint latest"):
        trained("run")


def test_a_failed_run_says_so_in_its_status(tiny_model, pictures_dir, tmp_path):
    with pytest.raises(InputError):
        dreambooth_nora.main(parse_options(flags(tiny_model, pictures_dir, tmp_path / "run", "--rank", "500")))
    status = RunDirectory(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "got 500" in status["error"]


def test_without_a_directory_a_new_run_is_made_under_runs(tiny_model, pictures_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = flags(tiny_model, pictures_dir, "unused")
    run = dreambooth_nora.main(parse_options(given[: given.index("--output_dir")]))
    assert run.path.parent == Path("runs")
    assert run.path.name.endswith(f"{pictures_dir.name}-nora")


def launched(folder, *arguments, cwd):
    """Run the trainer as a user does, through accelerate."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "training" / "dreambooth_nora.py"), *arguments, "--output_dir", str(folder)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_that_a_run_records_is_the_one_that_was_given(tiny_model, pictures_dir, tmp_path):
    given = flags(tiny_model, pictures_dir, tmp_path / "run")
    given = given[: given.index("--output_dir")]
    finished = launched(tmp_path / "run", *given, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    recorded = shlex.split((tmp_path / "run" / "command").read_text())
    assert recorded[:2] == ["accelerate", "launch"]
    assert recorded[3:] == [*given, "--output_dir", str(tmp_path / "run")]


@pytest.mark.slow
def test_bad_input_ends_the_command_with_its_message_and_no_traceback(tmp_path):
    finished = launched(
        tmp_path / "run", "--instance_data_dir", str(tmp_path / "none"), "--instance_prompt", PROMPT, cwd=tmp_path
    )
    assert finished.returncode != 0
    assert "error: There is no folder" in finished.stderr
    assert 'dreambooth_nora.py", line' not in finished.stderr


@pytest.mark.slow
def test_the_default_command_learns_the_sample_subject_from_any_directory(tmp_path):
    finished = launched(tmp_path / "run", "--heldout_image", "04.jpg", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    losses = [line["heldout_loss"] for line in RunDirectory(tmp_path / "run").metrics() if "heldout_loss" in line]
    assert losses[-1] < losses[0]
    stock = StableDiffusionXLPipeline.from_pretrained(BUILT_IN_MODEL, dtype=torch.float32)
    stock.load_lora_weights(tmp_path / "run" / "diffusers")
    for said in ("Dry run of 3 steps: ", "\nSuggested: step ", f"Look at {tmp_path / 'run' / 'before_after.png'}"):
        assert said in finished.stderr


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos lie beside the repository only where it is developed")
def test_real_photos_of_any_shape_are_trained_on(tiny_model, tmp_path):
    run = dreambooth_nora.main(parse_options(flags(tiny_model, PHOTOS, tmp_path / "run", "--heldout_image", "04.jpg")))
    assert run.status()["state"] == "done"


def test_a_dry_run_stops_after_its_report(trained):
    run = trained("run", "--dry_run")
    assert run.status()["state"] == "done"
    assert json.loads((run.path / "dry_run.json").read_text())["trained_numbers"] > 0
    assert not run.metrics()
    assert not list_checkpoints(run.checkpoints)
