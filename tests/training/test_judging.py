"""Which step a run suggests, and what it warns of."""

import json

import pytest
import torch
from tiny_pipeline import add_nora, tiny_pipeline, weight_changes

from pipelines.methods import AdapterOptions
from pipelines.subject import adapters
from training.judging import Point, adapter_at, heldout_curve, keep_adapter, suggest, suggest_for, write_suggestion
from training.run import RunDirectory


def curve(heldout, seen=None):
    """Points every ten steps, the first of them the base model."""
    seen = seen or [None] * len(heldout)
    return [Point(10 * place, loss, other) for place, (loss, other) in enumerate(zip(heldout, seen, strict=True))]


def test_the_least_heldout_loss_is_suggested_and_the_reason_names_it():
    found = suggest(curve([1.0, 0.8, 0.5, 0.7]), last=30)
    assert (found.step, found.last) == (20, 30)
    assert "0.5000 at step 20" in found.why


def test_a_loss_that_falls_to_the_end_suggests_the_last_step_without_a_warning():
    found = suggest(curve([1.0, 0.8, 0.6, 0.4], [1.0, 0.7, 0.5, 0.3]), last=30)
    assert (found.step, found.warnings) == (30, [])


def test_the_earliest_of_equally_good_steps_is_suggested():
    found = suggest(curve([1.0, 0.8, 0.505, 0.502, 0.5]), last=40)
    assert found.step == 20
    assert "as good as the least" in found.why
    assert suggest(curve([1.0, 0.8, 0.52, 0.502, 0.5]), last=40).step == 30


def test_overfitting_is_a_turn_of_the_heldout_loss_while_the_other_falls_on():
    (warning,) = suggest(curve([1.0, 0.5, 0.56], [1.0, 0.5, 0.4]), last=20).warnings
    assert warning.startswith("Overfitting: the held-out loss rises from 0.5000 at step 10 to 0.5600 at step 20")
    assert "from 0.5000 to 0.4000" in warning
    assert suggest(curve([1.0, 0.5, 0.54], [1.0, 0.5, 0.4]), last=20).warnings == []


def test_a_rise_of_both_losses_is_no_overfitting():
    (warning,) = suggest(curve([1.0, 0.5, 0.9], [1.0, 0.5, 0.8]), last=20).warnings
    assert "unstable" in warning
    assert "Overfitting" not in warning


def test_training_that_never_helps_is_said_so():
    found = suggest(curve([1.0, 1.1, 1.2]), last=20)
    assert found.step == 10
    assert "no better on the held-out picture" in found.warnings[0]


def test_training_that_only_learns_the_training_pictures_is_overfitting_from_its_start():
    warnings = suggest(curve([1.0, 1.1, 1.2], [1.0, 0.9, 0.8]), last=20).warnings
    assert "no better on the held-out picture" in warnings[0]
    assert warnings[1].startswith("Overfitting: the held-out loss rises from 1.0000 at step 0 to 1.2000 at step 20")
    assert len(suggest(curve([1.0, 1.001, 1.01], [1.0, 0.9, 0.8]), last=20).warnings) == 1


def test_a_rise_that_is_small_beside_what_was_learned_is_no_overfitting():
    assert suggest(curve([1.0, 0.99, 1.0], [1.0, 0.9, 0.6]), last=20).warnings == []
    assert suggest(curve([1.0, 0.99, 1.04], [1.0, 0.9, 0.6]), last=20).warnings != []


def test_without_a_heldout_picture_the_last_step_is_suggested_and_the_gap_named():
    found = suggest([], last=20)
    assert found.step == 20
    assert "not trained on" in found.warnings[0]


def test_folds_shorter_than_the_training_speak_only_of_a_turn_within_them():
    assert suggest(curve([1.0, 0.8, 0.6]), last=90).step == 90
    assert suggest(curve([1.0, 0.5, 0.6], [1.0, 0.5, 0.4]), last=90).step == 10


def test_the_curve_is_the_runs_own_or_else_the_mean_of_its_folds(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    assert heldout_curve(run) == []
    for fold, offset in enumerate((0.0, 0.2)):
        part = RunDirectory.create(run.path / "folds" / str(fold), {})
        part.log(0, heldout_loss=1.0 + offset, seen_loss=2.0)
        part.log(1, loss=9.0)
        part.log(5, heldout_loss=0.5 + offset, seen_loss=1.0 + offset)
    assert heldout_curve(run) == [Point(0, pytest.approx(1.1), 2.0), Point(5, pytest.approx(0.6), pytest.approx(1.1))]
    run.log(0, heldout_loss=3.0)
    run.log(4, heldout_loss=2.0)
    run.log(4, heldout_loss=1.0)
    assert heldout_curve(run) == [Point(0, 3.0), Point(4, 1.0)]


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_kept_adapter_is_small_and_loads_as_the_one_that_was_trained(tmp_path, method):
    pipe, other, options = tiny_pipeline(), tiny_pipeline(), AdapterOptions(method=method, rank=4, inner_r=2)
    if method == "nora":
        add_nora(pipe, components=("unet",), outer_init="svd", r=4, inner_r=2)
    else:
        adapters.attach(pipe, options)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    run = RunDirectory.create(tmp_path / "run", {})
    keep_adapter(run, 7, options, {"unet": pipe.unet})
    keep_adapter(run, 7, options, {"unet": pipe.unet})
    assert {path.name for path in adapter_at(run, 7).iterdir()} == {"compact" if method == "nora" else "full"}
    adapters.load_adapter(other, adapter_at(run, 7), "kept")
    kept = weight_changes(other, "kept")
    for name, change in weight_changes(pipe).items():
        torch.testing.assert_close(kept[name], change, rtol=1e-4, atol=1e-5)


def test_the_suggestion_on_disk_names_the_folder_of_the_kept_adapter(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    found = suggest(curve([1.0, 0.5, 0.7], [1.0, 0.5, 0.4]), last=20)
    write_suggestion(run, found)
    assert json.loads((run.path / "suggestion.json").read_text())["adapter"] is None
    adapter_at(run, 10).mkdir(parents=True)
    write_suggestion(run, found)
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["adapter"], len(said["warnings"])) == (10, "adapters/step-0000010", 1)
    assert said["curve"][1] == {"step": 10, "heldout": 0.5, "seen": 0.5}


@pytest.mark.parametrize(("base", "last", "warned"), [(0.3, 0.95, True), (0.3, 0.7, False), (0.95, 0.95, False)])
def test_samples_that_became_copies_of_training_pictures_are_warned_of(tmp_path, base, last, warned):
    run = RunDirectory.create(tmp_path / "run", {})
    for step, copy in ((0, base), (5, 0.5), (10, last)):
        run.log(step, subject_score=0.5, prompt_score=0.1, copy_score=copy)
    found = suggest_for(run, 10)
    assert any("A sample of step 10 is nearly a copy of a training picture (0.95 of 1)" in w for w in found.warnings) == warned
    assert found.scores[5] == {"subject": 0.5, "prompt": 0.1, "copy": 0.5}
