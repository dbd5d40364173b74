"""What a run knows of its steps: the held-out curve, the scores, the kept adapters; and the suggestion on disk."""

import json

import pytest
import torch
from tiny_options import TINY
from tiny_pipeline import add_nora, tiny_pipeline, weight_changes

from pipelines.adapter_options import AdapterOptions
from pipelines.subject import adapters
from training.runs.run import RunDirectory
from training.subject.checkpoint_selection import Point, StepScores, suggest
from training.subject.image_scoring import keep_adapter, suggest_for, write_suggestion
from training.subject.measured import adapter_at, heldout_curve, metric_name, sample_scores, saved_steps

SCORES = {"subject": 0.5, "prompt": 0.1, "copy": 0.5, "nearest": 0.6, "nearest_limit": 0.9}


def test_the_curve_is_that_of_the_run_or_the_mean_of_its_folds(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    assert heldout_curve(run) == []
    for fold, offset in enumerate((0.0, 0.2)):
        part = RunDirectory.create(run.path / "folds" / str(fold), {})
        part.log(0, heldout_loss=1.0 + offset, seen_loss=2.0)
        part.log(1, loss=9.0)
        part.log(5, heldout_loss=0.5 + offset, seen_loss=1.0 + offset)
    assert heldout_curve(run) == [Point(0, pytest.approx(1.1), 2.0), Point(5, pytest.approx(0.6), pytest.approx(1.1))]
    run.log(0, heldout_loss=3.0)
    assert len(heldout_curve(run)) == 2, "the base model alone is no curve"
    run.log(4, heldout_loss=2.0)
    run.log(4, heldout_loss=1.0)
    assert heldout_curve(run) == [Point(0, 3.0), Point(4, 1.0)]


@pytest.mark.parametrize("method", ["nora", "lora"])
def test_a_saved_adapter_is_small_and_loads_as_it_was_trained(tmp_path, method):
    pipe, other, options = tiny_pipeline(), tiny_pipeline(), AdapterOptions(method=method, rank=4, inner_r=2, **TINY)
    if method == "nora":
        add_nora(pipe, components=("unet",), outer_init="svd", r=4, inner_r=2)
    else:
        adapters.attach(pipe, options)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    run = RunDirectory.create(tmp_path / "run", {})
    keep_adapter(run, 7, {"unet": pipe.unet})
    keep_adapter(run, 7, {"unet": pipe.unet})
    assert saved_steps(run) == [7]
    assert {path.name for path in adapter_at(run, 7).iterdir()} == {"compact" if method == "nora" else "full"}
    adapters.load_adapter(other, adapter_at(run, 7), "kept")
    kept = weight_changes(other, "kept")
    for name, change in weight_changes(pipe).items():
        torch.testing.assert_close(kept[name], change, rtol=1e-4, atol=1e-5)


def test_suggestion_json_names_the_folder_of_the_saved_adapter(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    found = suggest([Point(0, 1.0, 1.0), Point(10, 0.5, 0.5), Point(20, 0.7, 0.4)], last=20)
    write_suggestion(run, found)
    assert json.loads((run.path / "suggestion.json").read_text())["adapter"] is None
    adapter_at(run, 10).mkdir(parents=True)
    write_suggestion(run, found)
    said = json.loads((run.path / "suggestion.json").read_text())
    assert (said["step"], said["adapter"], len(said["warnings"])) == (10, "adapters/step-0000010", 1)
    assert said["curve"][1] == {"step": 10, "heldout": 0.5, "seen": 0.5}


def log(run, step, **values):
    run.log(step, **{metric_name(name): value for name, value in {**SCORES, **values}.items()})


def test_the_recommended_step_follows_from_the_logged_scores(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    for step, subject in ((0, 0.2), (5, 0.3), (10, 0.6), (15, 0.8), (20, 0.81)):
        log(run, step, subject=subject)
    run.log(15, loss=0.5)
    log(run, 15, subject=0.7)
    found = suggest_for(run, 20)
    assert found.scores[10] == StepScores(0.6, 0.1, 0.5, 0.6, 0.9)
    assert found.scores[15].subject == 0.7
    assert found.step == 20
    write_suggestion(run, found)
    assert json.loads((run.path / "suggestion.json").read_text())["scores"]["10"] == {**SCORES, "subject": 0.6}


def test_scores_of_another_image_scorer_are_left_out(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    log(run, 0)
    log(run, 5)
    assert sorted(sample_scores(run)) == [0, 5]
    log(run, 10, nearest_limit=0.7)
    assert sorted(sample_scores(run)) == [10]
