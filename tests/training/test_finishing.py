"""What comes before and after the training itself: leave-one-out, the suggestion, and the images drawn for it."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from subject_runs import are_equal, parameters

from pipelines.errors import InputError
from pipelines.subject.scores import ImageScores
from training import dreambooth_nora
from training.options import SubjectOptions
from training.options.output import OutputOptions
from training.options.validation import ValidationOptions
from training.runs.run import RunDirectory
from training.subject import finishing, samples
from training.subject.measured import heldout_curve

LEAVE_ONE_OUT = ("--heldout_image", "leave_one_out", "--heldout_steps", "1")
MEASURED = ("--heldout_image", "0.png", "--heldout_steps", "1", "--learning_rate", "0.1")


@pytest.fixture(scope="module")
def folded(trainer, tmp_path_factory):
    """A run after leave-one-out."""
    return trainer.train(tmp_path_factory.mktemp("folded") / "run", *LEAVE_ONE_OUT)


def test_leave_one_out_measures_each_image_and_does_not_change_the_adapter(trainer, folded, tmp_path):
    plain = trainer.train(tmp_path / "plain")
    assert are_equal(parameters(plain), parameters(folded))
    folds = sorted(path.name for path in (folded.path / "folds").iterdir())
    assert folds == ["0", "1", "2"]
    for name in folds:
        lines = RunDirectory(folded.path / "folds" / name).metrics()
        assert [line.step for line in lines if "heldout_loss" in line.values] == [0, 1, 2]
    assert [point.step for point in heldout_curve(folded)] == [0, 1, 2]


def test_an_interrupted_leave_one_out_resumes(trainer, folded, tmp_path):
    for fold in "01":
        shutil.copytree(folded.path / "folds" / fold, tmp_path / "run" / "folds" / fold)
    before = (tmp_path / "run" / "folds" / "0" / "metrics.jsonl").read_bytes()
    resumed = trainer.train(tmp_path / "run", *LEAVE_ONE_OUT)
    assert (resumed.path / "folds" / "0" / "metrics.jsonl").read_bytes() == before
    assert are_equal(parameters(resumed), parameters(folded))
    assert heldout_curve(resumed) == heldout_curve(folded)


def test_training_for_far_too_long_recommends_and_exports_an_earlier_adapter_and_warns(trainer, tmp_path, monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.8, 0.9])
    seen = iter([1.0, 0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        "training.subject.validation.measured_losses", lambda *_: {"heldout_loss": next(losses), "seen_loss": next(seen)}
    )
    run = trainer.run(tmp_path / "run", *MEASURED, "--num_candidate_images", "0")
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["last"], said["adapter"]) == (1, 4, "adapters/step-0000001")
    assert "Overfitting" in said["warnings"][0]
    assert run.status().suggested_step == 1
    suggested = load_file(run.path / "suggested" / "diffusers" / "pytorch_lora_weights.safetensors")
    last = load_file(run.path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert suggested.keys() == last.keys()
    assert any((suggested[name] - last[name]).abs().max() > 1e-3 for name in last)


class Listed:
    """A judge that gives the likenesses of a list, in its order."""

    nearest_limit = 0.9

    def __init__(self, likenesses):
        self.likenesses = iter(likenesses)

    def scores(self, images, prompts):
        likeness = next(self.likenesses)
        return [ImageScores(likeness, 0.3, 0.1, 0.2) for _ in images]


@pytest.fixture
def overfitting(monkeypatch):
    """Have the held-out loss turn after the first of four steps; the first two keep at least half of its fall."""
    losses = [{"heldout_loss": 1.0, "seen_loss": 1.0}, *({"heldout_loss": 0.4 + 0.1 * k, "seen_loss": 0.5} for k in (1, 2, 4, 5))]
    turning = iter(losses)
    monkeypatch.setattr("training.subject.validation.measured_losses", lambda *_: next(turning))


def test_missing_samples_are_generated_after_training_and_the_most_similar_step_is_recommended(
    trainer, tmp_path, overfitting, monkeypatch
):
    # The base model, the steps that are shown while training, the one that is drawn after it.
    monkeypatch.setattr(dreambooth_nora, "create_image_scorer", lambda *_: Listed([0.1, 0.5, 0.9, 0.3]))
    certified = []
    monkeypatch.setattr(finishing, "certify", lambda pipeline, *_: certified.append((pipeline, pipeline.get_active_adapters())))
    run = trainer.run(tmp_path / "run", *MEASURED, "--certify", "true")
    assert [line.step for line in run.metrics() if "subject_score" in line.values] == [0, 2, 4, 1]
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["adapter"]) == (2, "adapters/step-0000002")
    assert said["scores"]["1"]["subject"] == 0.3
    assert run.status().suggested_step == 2
    assert "| **2, recommended** | 0.500 | 0.300 | 0.200 | 0.10 | 0.6000 |" in (run.path / "README.md").read_text()
    # The certificate speaks of the trained adapter, which is on the model again, alone.
    ((pipeline, active),) = certified
    assert active == list(pipeline.unet.peft_config) == ["default"]


def test_the_images_of_the_recommended_step_are_generated_once(trainer, tmp_path, overfitting, monkeypatch):
    monkeypatch.setattr(dreambooth_nora, "create_image_scorer", lambda *_: Listed([0.1, 0.5, 0.9, 0.8]))
    drawn, draw = [], samples.generate
    monkeypatch.setattr(samples, "generate", lambda *given: drawn.append(given) or draw(*given))
    run = trainer.run(tmp_path / "run", *MEASURED)
    assert run.status().suggested_step == 1
    assert len(drawn) == len(["before", "step 2", "step 4", "step 1"])


def test_the_saved_images_of_the_last_step_are_those_of_the_trained_adapter(trainer, tmp_path, monkeypatch):
    compared = []

    def compare(run, trained, options):
        saved, generated = finishing.samples_of(run, trained, 4), trained.sampler.generate()
        compared.append([[image.tobytes() for image in images] for images in (saved, generated)])

    monkeypatch.setattr(dreambooth_nora, "finish", compare)
    # The files hold the moving average, rounded.
    trainer.run(tmp_path / "run", *MEASURED, "--use_ema", "--ema_decay", "0.5", "--inner_dtype", "float16")
    ((saved, generated),) = compared
    assert saved == generated


def test_without_validation_images_nothing_is_generated_and_the_loss_recommends_a_step(
    trainer, tmp_path, overfitting, monkeypatch
):
    monkeypatch.setattr(samples, "generate", lambda *_: pytest.fail("generated"))
    run = trainer.run(tmp_path / "run", *MEASURED, "--no_validation_images")
    assert run.status().suggested_step == 1
    assert (run.path / "suggested" / "diffusers").is_dir()
    assert sorted(path.name for path in run.samples.iterdir()) == ["subject"]
    assert not (run.path / "before_after.png").exists()
    assert "before_after.png" not in (run.path / "README.md").read_text()
    assert not any("subject_score" in line.values for line in run.metrics())
    phases = {phase.name: phase.seconds for phase in run.status().plan}
    assert "sampling" not in phases
    assert phases["training"] > 0
    assert run.status().peak_memory >= json.loads((run.path / "dry_run.json").read_text())["peak_memory"]


def test_checkpoints_are_not_compared_without_validation_images():
    with pytest.raises(InputError, match=r"num_candidate_images must be 0 with --no_validation_images, got 2"):
        SubjectOptions(output=OutputOptions(validation_images=False), validation=ValidationOptions(num_candidate_images=2))
