"""What a run hands on, whole: the certificate, the suggestion, leave-one-out."""

import json
from functools import partial

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from pipelines.subject.generate import Sampling
from pipelines.subject.scores import Scores
from training import dreambooth_nora
from training.options import parse_options
from training.runs.run import RunDirectory
from training.subject import samples

FAST = "--rank 6 --inner_r 2 --target_modules to_v --max_train_steps 4 --train_batch_size 2 --lr_warmup_steps 1"
FAST += " --learning_rate 0.1 --checkpointing_steps 2 --validation_steps 2 --heldout_steps 1 --instance_prompt toy"
FAST += " --validation_prompt toy"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Few inference steps, and the precision of no other test's run."""
    monkeypatch.setattr(dreambooth_nora, "Sampling", partial(Sampling, num_inference_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trained(tiny_model, pictures_dir, tmp_path):
    """Runs the trainer with the flags given, in a folder of that name."""

    def run(name, *more):
        given = ["--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(pictures_dir)]
        return dreambooth_nora.main(parse_options([*FAST.split(), *given, "--output_dir", str(tmp_path / name), *more]))

    return run


def test_a_run_is_certified_by_default(trained):
    run = trained("run", "--heldout_image", "none")
    said = json.loads((run.path / "certificate.json").read_text())
    assert said["passed"]
    assert said["effect"] > 0
    scored = [line for line in run.metrics() if "subject_score" in line]
    assert [line["step"] for line in scored] == [0, 2, 4]
    assert all({"prompt_score", "copy_score", "nearest_score", "nearest_limit"} <= line.keys() for line in scored)


def adapter_bytes(run):
    return (run.path / "adapter" / "full" / "unet" / "adapter_model.safetensors").read_bytes()


def test_leave_one_out_measures_each_picture_and_does_not_change_what_is_learned(trained):
    plain = trained("plain", "--heldout_image", "none", "--no_certify")
    folded = trained("folded", "--no_certify")
    assert adapter_bytes(plain) == adapter_bytes(folded)
    folds = sorted(path.name for path in (folded.path / "folds").iterdir())
    assert folds == ["0", "1", "2"]
    for name in folds:
        lines = RunDirectory(folded.path / "folds" / name).metrics()
        assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 1, 2]
    said = json.loads((folded.path / "suggestion.json").read_text())
    assert [point["step"] for point in said["curve"]] == [0, 1, 2]


def test_an_interrupted_leave_one_out_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    whole = trained("whole", "--no_certify")
    fold_of = dreambooth_nora.leave_one_out

    def killed(accelerator, run, loss, folds, *rest):
        fold_of(accelerator, run, loss, list(folds)[:2], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(dreambooth_nora, "leave_one_out", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("halves", "--no_certify")
    monkeypatch.setattr(dreambooth_nora, "leave_one_out", fold_of)
    before = (tmp_path / "halves" / "folds" / "0" / "metrics.jsonl").read_bytes()
    (tmp_path / "halves" / "options.json").unlink()
    halves = trained("halves", "--no_certify")
    assert (halves.path / "folds" / "0" / "metrics.jsonl").read_bytes() == before
    assert adapter_bytes(whole) == adapter_bytes(halves)
    curves = [json.loads((run.path / "suggestion.json").read_text())["curve"] for run in (whole, halves)]
    assert curves[0] == curves[1]


@pytest.fixture
def overfitting(monkeypatch):
    """Have the held-out loss turn after the first of four steps; the first two keep at least half of its fall."""
    losses = [{"heldout_loss": 1.0, "seen_loss": 1.0}, *({"heldout_loss": 0.4 + 0.1 * k, "seen_loss": 0.5} for k in (1, 2, 4, 5))]
    turning = iter(losses)
    monkeypatch.setattr("training.subject.watching.measured_losses", lambda *_: next(turning))


def test_training_far_too_long_suggests_an_earlier_adapter_exports_it_and_warns(trained, monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.8, 0.9])
    seen = iter([1.0, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        "training.subject.watching.measured_losses", lambda *_: {"heldout_loss": next(losses), "seen_loss": next(seen)}
    )
    run = trained("run", "--heldout_image", "0.png", "--no_certify", "--drawn_candidates", "0")
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["last"], said["adapter"]) == (1, 4, "adapters/step-0000001")
    assert "Overfitting" in said["warnings"][0]
    assert run.status()["suggested_step"] == 1
    suggested = load_file(run.path / "suggested" / "diffusers" / "pytorch_lora_weights.safetensors")
    last = load_file(run.path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert suggested.keys() == last.keys()
    assert any((suggested[name] - last[name]).abs().max() > 1e-3 for name in last)


class Listed:
    """A judge that gives the likenesses of a list, in its order."""

    nearest_limit = 0.9

    def __init__(self, likenesses):
        self.likenesses = iter(likenesses)

    def scores(self, pictures, prompts):
        likeness = next(self.likenesses)
        return [Scores(likeness, 0.3, 0.1, 0.2) for _ in pictures]


def pixels(run, step):
    return np.asarray(Image.open(run.samples / f"step-{step:07d}.png")).astype(int)


def test_a_step_without_samples_draws_them_after_training_and_the_most_alike_is_suggested(trained, overfitting, monkeypatch):
    # The base model, the steps that are shown while training, the one that is drawn after it.
    monkeypatch.setattr(dreambooth_nora, "judge_by", lambda *_: Listed([0.1, 0.5, 0.9, 0.3]))
    run = trained("run", "--heldout_image", "0.png")
    assert [line["step"] for line in run.metrics() if "subject_score" in line] == [0, 2, 4, 1]
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["adapter"]) == (2, "adapters/step-0000002")
    assert said["scores"]["1"]["subject"] == 0.3
    assert run.status()["suggested_step"] == 2
    assert "| **2, suggested** | 0.500 | 0.300 | 0.200 | 0.10 | 0.6000 |" in (run.path / "README.md").read_text()
    # The certificate speaks of the trained adapter, which is on the model again.
    assert json.loads((run.path / "certificate.json").read_text())["passed"]


def test_samples_drawn_after_training_are_those_that_the_step_would_have_drawn(trained):
    late = trained("late", "--heldout_image", "none", "--no_certify", "--drawn_candidates", "4")
    live = trained("live", "--heldout_image", "none", "--no_certify", "--validation_steps", "1")
    for step in (1, 3):
        assert np.abs(pixels(late, step) - pixels(live, step)).max() <= 1
    assert np.abs(pixels(live, 1) - pixels(live, 3)).max() > 1


def test_the_suggested_steps_pictures_are_drawn_once(trained, overfitting, monkeypatch):
    monkeypatch.setattr(dreambooth_nora, "judge_by", lambda *_: Listed([0.1, 0.5, 0.9, 0.8]))
    drawn, draw = [], samples.generate
    monkeypatch.setattr(samples, "generate", lambda *given: drawn.append(given) or draw(*given))
    run = trained("run", "--heldout_image", "0.png", "--no_certify")
    assert run.status()["suggested_step"] == 1
    assert len(drawn) == len(["before", "step 2", "step 4", "after", "step 1"])
