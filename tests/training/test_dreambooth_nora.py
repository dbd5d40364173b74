"""The subject trainer, whole, on a tiny random model; and its default command on the built-in one."""

import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from subject_runs import are_equal, parameters
from tiny_pipeline import tiny_pipeline

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.images import read_settings
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "subjects" / "robot_toy"
EXPORTED = ("adapter", "adapters", "suggested", "diffusers", "kohya")


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_run_directory_has_all_files_and_the_final_status(everything, lora_run, method):
    run = {"nora": everything.run, "lora": lora_run}[method]
    files = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    expected = {"options.json", "command", "status.json", "metrics.jsonl", "README.md", "before_after.png"}
    expected |= {"provenance.json", "suggestion.json"}
    expected |= {"samples/step-0000002.png", "samples/step-0000004.png", "diffusers/pytorch_lora_weights.safetensors"}
    expected |= {"kohya/sks-toy-step4.safetensors", "adapter/full/unet/adapter_config.json"}
    assert expected <= files
    assert ("adapter/compact/unet/adapter_model.safetensors" in files) == (method == "nora")
    status = run.status()
    assert (status.state, status.phase, status.step, status.total) == ("done", "done", 4, 4)
    assert [line.step for line in run.metrics() if "loss" in line.values] == [1, 2, 3, 4]
    assert [line.step for line in run.metrics() if "heldout_loss" in line.values] == ([0, 2, 4] if method == "lora" else [])
    assert json.loads((run.path / "options.json").read_text())["adapter"]["method"] == method
    assert "before_after.png" in (run.path / "README.md").read_text()


def test_samples_are_scored_at_every_step_that_generates_them(lora_run):
    scored = [line for line in lora_run.metrics() if "subject_score" in line.values]
    assert [line.step for line in scored] == [0, 2, 4]
    assert all({"prompt_score", "copy_score", "nearest_score", "nearest_limit"} <= line.values.keys() for line in scored)


def test_every_sample_is_saved_with_its_settings_and_so_are_samples_of_the_base_model_and_training_images(everything):
    run = everything.run
    assert sorted(path.name for path in run.samples.iterdir() if path.is_dir()) == [
        *(f"step-000000{step}" for step in range(5)),
        "subject",
    ]
    assert len(list(run.subject.iterdir())) == 3
    for step in range(5):
        said = [read_settings(run.samples_at(step) / f"{place}.png") for place in range(2)]
        told = [(each["prompt"], each["seed"], each["step"]) for each in said]
        assert told == [("toy in snow", 5, step), ("toy at night", 6, step)]
        assert Path(said[0]["model"]).is_dir()


def test_phases_are_named_in_their_order(everything):
    assert everything.phases == [
        *("loading", "encoding", "drawing class images", "sampling", "dry run", "calibrating"),
        *("training", "exporting", "comparing", "done"),
    ]


def test_the_recorded_options_repeat_a_run_exactly_even_with_requests_during_training(everything, again):
    first, second = everything.run, again.run
    files = [
        {path.relative_to(run.path): path.read_bytes() for kind in EXPORTED for path in (run.path / kind).rglob("*.safetensors")}
        for run in (first, second)
    ]
    assert len(files[0]) > len(EXPORTED)
    assert files[0] == files[1]
    assert (first.path / "before_after.png").read_bytes() == (second.path / "before_after.png").read_bytes()
    metrics = [[replace(line, time=0) for line in run.metrics()] for run in (first, second)]
    assert metrics[0] == metrics[1]
    assert (first.path / "suggestion.json").read_bytes() == (second.path / "suggestion.json").read_bytes()
    assert [[path.name for path in list_checkpoints(run.checkpoints)] for run in (first, second)] == [
        ["step-0000002", "step-0000004"],
        ["step-0000003", "step-0000004"],
    ]


def test_samples_of_a_saved_adapter_equal_those_generated_at_its_step(everything, again):
    """The first run draws those of steps 1 and 3 at its end, with the adapters kept; the second was asked for step 3's."""
    assert list(again.drawn) == [0, 2, 3, 4, 1]
    shown = [np.asarray(image).astype(int) for image in again.drawn[3]]
    for place, live in enumerate(shown):
        late = np.asarray(Image.open(everything.run.samples_at(3) / f"{place}.png")).astype(int)
        assert np.abs(late - live).max() <= 1
        other = np.asarray(Image.open(everything.run.samples_at(1) / f"{place}.png")).astype(int)
        assert np.abs(other - live).max() > 1


def test_images_after_training_equal_those_of_the_stock_pipeline(everything):
    stock = tiny_pipeline()
    stock.load_lora_weights(everything.run.path / "diffusers")
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    image = stock("toy in snow", generator=torch.Generator().manual_seed(5), **settings).images[0]
    before, after = (np.asarray(Image.open(everything.run.samples_at(step) / "0.png")).astype(int) for step in (0, 4))
    assert np.abs(np.asarray(image).astype(int) - after).max() <= 1
    assert np.abs(before - after).max() > 1


def test_every_way_of_computing_a_step_gives_the_same_adapter(trainer, tmp_path):
    expected = parameters(trainer.train(tmp_path / "plain"))
    run = trainer.train(tmp_path / "explicit", "--gradient_checkpointing", "--mixed_precision", "no")
    for key, value in parameters(run).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("prepare", "more", "message"),
    [
        ("nothing", [], r"holds no image"),
        ("broken", [], r"(?s)no image that can be used.*broken\.png.* cannot be read"),
        ("good", ["--heldout_image", "z.png"], r"heldout_image must be auto, none, .* or one of good\.png, got 'z\.png'"),
        ("good", ["--heldout_image", "good.png"], r"heldout_image needs at least 2 images, got 1"),
        ("good", ["--rank", "500"], r"r must be in .*got 500"),
        ("good", ["--pretrained_model_name_or_path", "./nowhere"], r"no model './nowhere'"),
    ],
)
def test_bad_input_is_named_before_training_and_in_the_status_if_there_is_a_run(trainer, tmp_path, prepare, more, message):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if prepare == "good":
        Image.new("RGB", (20, 20)).save(folder / "good.png")
    if prepare == "broken":
        (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=message):
        trainer.train(tmp_path / "run", *more, images=folder)
    run = RunDirectory(tmp_path / "run", writes=False)
    assert not list_checkpoints(run.checkpoints)
    if run.path.exists():
        assert run.status().state == "failed"
        assert re.search(message, run.status().error)


def test_a_bad_image_is_left_out_and_named_in_the_run(trainer, plain, images_dir, tmp_path):
    shutil.copytree(images_dir, tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no image")
    mended = trainer.prepare(tmp_path / "run", images=tmp_path / "pictures")
    entries = json.loads((mended.run.path / "photos.json").read_text())["pictures"]
    verdicts = {Path(entry["path"]).name: entry["verdict"] for entry in entries}
    assert verdicts.pop("broken.png") == "left out"
    assert "left out" not in verdicts.values()
    assert all(are_equal(*pair) for pair in zip(plain.batches(), mended.batches(), strict=True))


def test_a_run_is_never_overwritten(trainer, lora_run):
    with pytest.raises(InputError, match=r"contains a run.*another --output_dir.*--resume_from_checkpoint latest"):
        trainer.run(lora_run.path, "--method", "lora")


def test_without_a_directory_a_new_run_is_made_under_runs_and_records_its_command(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["training/dreambooth_nora.py", "--instance_prompt", "sks toy"])
    run = trainer.prepare(None).run
    assert run.path.parent == Path("runs")
    assert run.path.name.endswith(f"{trainer.images.name}-nora")
    assert shlex.split((run.path / "command").read_text()) == ["accelerate", "launch", *sys.argv]


def test_bad_input_ends_the_program_with_its_message_and_no_traceback(tmp_path, monkeypatch):
    program = ROOT / "training" / "dreambooth_nora.py"
    given = ["--instance_data_dir", str(tmp_path / "none"), "--instance_prompt", "toy", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [str(program), *given])
    with pytest.raises(SystemExit, match=r"^error: There is no folder") as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.__suppress_context__


# Enough for the held-out loss to fall; samples at the start and the end only, and one image of each to choose among.
FEWER_STEPS = ["--max_train_steps", "20", "--validation_steps", "20", "--num_candidate_images", "1"]


def readme_command():
    """The README's first command, in words, but for the installation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "accelerate launch" in block)
    return shlex.split(block.partition("&&")[2])


@pytest.mark.slow(35)
def test_the_readmes_first_command_learns_the_sample_subject_certifies_it_and_records_itself(tmp_path):
    command = [*readme_command(), *FEWER_STEPS]
    (tmp_path / "training").symlink_to(ROOT / "training")
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    finished = subprocess.run(program, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (run,) = (RunDirectory(path, writes=False) for path in (tmp_path / "runs").iterdir())
    losses = [line.values["heldout_loss"] for line in run.metrics() if "heldout_loss" in line.values]
    assert losses[-1] < losses[0]
    stock = StableDiffusionXLPipeline.from_pretrained(BUILT_IN_MODEL, dtype=torch.float32)
    stock.load_lora_weights(run.path / "diffusers")
    certificate = json.loads((run.path / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["effect"] > 0
    recorded = shlex.split((run.path / "command").read_text())
    assert [recorded[:2], recorded[3:]] == [["accelerate", "launch"], FEWER_STEPS]
    for said in (
        "Dry run: ",
        "\nRecommended: step ",
        f"Images before and after: {Path('runs') / run.path.name / 'before_after.png'}",
    ):
        assert said in finished.stderr


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos lie beside the repository only where it is developed")
def test_real_photos_of_any_shape_are_trained_on(trainer, tmp_path):
    prepared = trainer.prepare(tmp_path / "run", images=PHOTOS)
    assert all(torch.isfinite(batch["latents"]).all() for batch in prepared.batches())


def test_what_an_approximate_export_leaves_out_is_said_before_training_and_in_the_card(trainer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nora_vision.weight_change.EXPORT_RANK", 2)
    with caplog.at_level(logging.WARNING):
        run = trainer.run(tmp_path / "run", "--method", "oft", "--block_size", "4", "--max_train_steps", "2")
    share = run.status().expected_left_out
    assert 0 < share < 1
    sentences = caplog.text
    assert f"expected to leave out about {share:.0%} of the weight change" in sentences
    assert sentences.index("is expected to leave out") < sentences.index("pytorch_lora_weights.safetensors is not exact")
    card = (run.path / "README.md").read_text()
    assert re.search(
        r"> \*\*kohya/[\w\\-]+2.safetensors is not exact:\*\* it holds the best approximation .* leaves out \d+\.\d% ", card
    )


def test_a_dry_run_stops_after_its_report(trainer, tmp_path):
    run = trainer.run(tmp_path / "run", "--dry_run")
    assert run.status().state == "done"
    assert json.loads((run.path / "dry_run.json").read_text())["num_trainable_parameters"] > 0
    assert not run.metrics()
    assert not list_checkpoints(run.checkpoints)
