"""The arena from its command to its report, on cells whose trainings are stand-ins."""

import csv
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_sets import class_files, write_files
from PIL import Image

from pipelines.fewshot.metric_values import Interval
from training.arena import main
from training.comparison.analysis import (
    base_model_summaries,
    comparisons_of,
    merged,
    summaries_of,
    with_seconds_to_quality,
)
from training.comparison.blind import write_sheets
from training.comparison.figures import write_figures
from training.comparison.measures import loss_curve
from training.comparison.report import markdown, write_document, write_report
from training.comparison.results import CellResults, read_results
from training.comparison.variants import MethodVariant
from training.comparison.verdict import verdict_of
from training.options.arena import parse_arena_options
from training.runs.arena_files import BLIND, KEY, RATINGS, RESULTS, ArenaReport, CellResult, Observation
from training.runs.arena_results import MEASURES, base_model, comparisons_to_best, front_of, points_of, ranked
from training.runs.progress import PlannedPhase
from training.runs.run_files import METRICS, RunStatus
from training.runs.subject_files import EVALUATION


def observation(variant, dataset, seed, quality, parameters=100, task="few-shot", **more):
    measure = "top1" if task == "few-shot" else "heldout_loss"
    shots = 4 if task == "few-shot" else None
    return Observation(
        task,
        dataset,
        variant,
        shots,
        seed,
        {measure: quality, "parameters": parameters, **more},
        f"cells/{variant}-{dataset}-{seed}",
    )


def report_of(observations, **more):
    variants = list(dict.fromkeys(one.variant for one in observations))
    summaries = summaries_of(observations)
    return ArenaReport(variants, 100, None, observations, summaries, comparisons_of(observations, summaries), **more)


@pytest.fixture
def observations():
    """Two equal methods of different sizes, and one that is worse on every split."""
    qualities = {"large": (0.8, 1000), "small": (0.8, 10), "worse": (0.6, 500)}
    noise = {"large": 0.0, "small": 0.001, "worse": 0.002}
    return [
        observation(name, dataset, seed, quality + 0.01 * seed + noise[name] * (-1) ** seed, parameters)
        for name, (quality, parameters) in qualities.items()
        for dataset in ("cats", "leaves", "signs")
        for seed in range(5)
    ]


def test_the_verdict_names_the_best_the_smallest_that_is_not_worse_and_a_caveat(observations):
    report = report_of(observations)
    best, smallest, caveat = verdict_of(report, "few-shot")
    assert "has the best top-1 on the labelled datasets at 4 shots" in best
    assert "the difference to 1 of the other 2 methods is not significant" in best
    assert "small" in smallest
    assert "10 trained parameters" in smallest
    assert caveat == "It was below zero-shot on 0% of the splits."


def test_the_verdict_says_when_no_difference_could_be_significant(observations):
    few = [one for one in observations if one.dataset == "cats" and one.seed < 2]
    assert verdict_of(report_of(few), "few-shot")[1] == (
        "On 2 splits no difference between 3 methods can be significant: add seeds, or data."
    )


def test_a_difference_on_every_split_is_significant_and_one_that_changes_sign_is_not(observations):
    large, worse = comparisons_to_best(report_of(observations), "few-shot", 4)
    assert (large.variant, large.best) == ("large", "small")
    assert large.adjusted_p > 0.5
    assert (worse.variant, worse.best) == ("worse", "small")
    assert worse.adjusted_p < 0.001


def test_p_values_are_adjusted_for_the_number_of_methods_and_not_of_pairs():
    """Forty methods, of which one is better on all of fifteen splits."""
    qualities = {"best": 0.9, **{f"other{index}": 0.5 + 0.001 * index for index in range(39)}}
    report = report_of(
        [
            observation(name, dataset, seed, quality)
            for name, quality in qualities.items()
            for dataset in ("cats", "leaves", "signs")
            for seed in range(5)
        ]
    )
    comparisons = comparisons_to_best(report, "few-shot", 4)
    assert len(comparisons) == 39
    assert all(one.adjusted_p == pytest.approx(39 * 2 / 2**15) for one in comparisons)
    assert "the difference to every other method is significant" in verdict_of(report, "few-shot")[0]


def test_comparisons_of_all_pairs_in_an_earlier_report_are_left_out(observations):
    content = report_of(observations).to_json()
    pair = {"task": "few-shot", "shots": 4, "measure": "top1", "first": "large", "second": "small", "count": 15}
    earlier = content | {"version": 1, "comparisons": [pair | {"difference": vars(Interval(0, 0, 0)), "p": 1, "adjusted_p": 1}]}
    assert ArenaReport.from_json(json.loads(json.dumps(earlier))).comparisons == ()


def test_a_method_that_lacks_splits_is_named_and_not_compared(observations):
    """Its mean, of the easier data alone, would be the best."""
    easy = {"cats": 0.3, "leaves": 0.0, "signs": 0.0}
    given = [replace(one, values=one.values | {"top1": one.values["top1"] + easy[one.dataset]}) for one in observations]
    report = report_of([one for one in given if one.variant != "worse" or one.dataset == "cats"])
    assert [one.variant for one in ranked(report.summaries, "few-shot", 4, "top1")] == ["small", "large"]
    assert [one.variant for one in comparisons_to_best(report, "few-shot", 4)] == ["large"]
    assert "worse" not in front_of(report, "few-shot", 4)
    assert verdict_of(report, "few-shot")[0].startswith("small has the best top-1")
    assert "worse has results on 5 of 15 splits and is not compared." in markdown(report, {})


def test_methods_are_compared_on_the_splits_that_both_have(observations):
    """Each lacks one split, and another one."""
    missing = {("small", "signs", 0), ("worse", "cats", 1), ("large", "cats", 1)}
    rest = [one for one in observations if (one.variant, one.dataset, one.seed) not in missing]
    assert {one.variant: one.count for one in comparisons_to_best(report_of(rest), "few-shot", 4)} == {"large": 13, "worse": 13}


def test_a_lower_loss_is_better():
    losses = [
        observation(name, "toy", seed, loss, task="subject") for name, loss in (("a", 0.5), ("b", 0.4)) for seed in range(2)
    ]
    assert [one.variant for one in ranked(summaries_of(losses), "subject", None, "heldout_loss")] == ["b", "a"]


def test_the_bounds_of_a_point_are_those_of_its_paired_difference_to_the_best(observations):
    """The datasets differ much more than the methods."""
    level = {"cats": 0.0, "leaves": 0.1, "signs": -0.4}
    report = report_of(
        [replace(one, values=one.values | {"top1": one.values["top1"] + level[one.dataset]}) for one in observations]
    )
    (best, _, quality, *bounds), *_, (worse, _, lowest, low, high) = points_of(report, "few-shot", 4)
    assert (best, worse) == ("small", "worse")
    assert bounds == [quality, quality]
    assert lowest - 0.01 < low < lowest < high < lowest + 0.01


def test_the_front_has_the_smallest_method_of_each_quality(observations):
    assert front_of(report_of(observations), "few-shot", 4)[0] == "small"
    assert "worse" not in front_of(report_of(observations), "few-shot", 4)


def test_the_values_of_a_split_are_joined_from_all_its_cells():
    first = replace(observation("lora", "cats", 0, 0.8), curve=[(1.0, 0.8)])
    second = Observation("few-shot", "cats", "lora", 4, 0, {"harmonic_mean": 0.5}, "cells/other")
    (joined,) = merged([first, second])
    assert joined.values == {"top1": 0.8, "parameters": 100, "harmonic_mean": 0.5}
    assert (joined.cell, joined.curve) == (first.cell, first.curve)


def test_seconds_to_quality_are_those_until_the_reference_s_last_value_is_reached():
    def one(variant, curve):
        return Observation("subject", "toy", variant, None, 0, {}, "cells/x", curve)

    curves = {"lora": [(0, 1.0), (5, 0.7), (9, 0.6)], "fast": [(0, 1.0), (2, 0.55), (4, 0.5)], "never": [(0, 1.0), (9, 0.9)]}
    timed = with_seconds_to_quality([one(name, curve) for name, curve in curves.items()], "lora")
    assert [each.values.get("seconds_to_quality") for each in timed] == [9, 2, None]


def test_the_report_of_subjects_has_the_loss_of_the_base_model():
    """Of the variants that start at it, on every split that one of them has; a start elsewhere says nothing about it."""
    losses = {("toy", 0): 1.0, ("toy", 1): 0.8, ("mug", 0): 0.6}

    def one(variant, split, start):
        given = observation(variant, *split, start - 0.1, task="subject")
        return replace(given, curve=[(0, start), (5, start - 0.1)])

    given = [one(variant, split, start) for variant in ("lora", "dora") for split, start in losses.items()]
    given = [*given[1:], *(one("lora_one", split, 0.3) for split in losses)]
    report = report_of(given, base_model=base_model_summaries(given, ["lora", "dora"]))
    assert {dataset: one.value for dataset, one in base_model(report, "subject").items()} == {
        None: pytest.approx(0.75),
        "toy": pytest.approx(0.9),
        "mug": pytest.approx(0.6),
    }
    assert "; base model 0.7500)" in verdict_of(report, "subject")[0]
    rows = [line for line in markdown(report, {}).splitlines() if line.startswith("| Base model |")]
    assert [row.split("|")[2].split()[0] for row in rows] == ["0.7500", "0.9000"]


@pytest.mark.parametrize(
    ("label", "starts"),
    [("lora", True), ("lora:learning_rate=0.1", True), ("nora:inner_init=gaussian", False), ("lora_one", False), ("gda", False)],
)
def test_a_variant_with_options_may_start_elsewhere_than_at_the_base_model(label, starts):
    assert MethodVariant.parse(label).starts_at_base == starts


def test_the_report_is_written_as_markdown_csv_and_json_and_read_back(observations, tmp_path):
    report = report_of(observations, failed={"few-shot/loftq": "it needs a quantised model"})
    figures = write_figures(report, tmp_path)
    write_report(report, tmp_path, figures)
    assert ArenaReport.read(tmp_path) == ArenaReport.from_json(json.loads((tmp_path / "arena.json").read_text()))
    assert ArenaReport.read(tmp_path).summaries[0].interval == Interval(**vars(report.summaries[0].interval))
    rows = list(csv.DictReader((tmp_path / "observations.csv").open()))
    assert len(rows) == 2 * len(observations)
    text = (tmp_path / "README.md").read_text()
    assert "few-shot/loftq: it needs a quantised model" in text
    for name in figures["few-shot"]:
        assert (tmp_path / name).stat().st_size > 1000
        assert f"({name})" in text


def test_a_document_gets_the_report_between_its_comments_and_the_figures_beside_it(observations, tmp_path):
    document = tmp_path / "arena.md"
    document.write_text("before\n<!-- begin: few-shot, by nora-vision arena -->\nold\n<!-- end: few-shot -->\nafter\n")
    report = report_of(observations)
    figures = write_figures(report, tmp_path)
    write_document(report, document, tmp_path, figures)
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1], "old" in lines) == ("before", "after", False)
    assert all(
        (tmp_path / "arena" / name).is_file() and f"(arena/{name})" in document.read_text() for name in figures["few-shot"]
    )


def test_a_method_s_name_cannot_break_a_table(observations):
    text = markdown(report_of([observation("a|b", "cats", seed, 0.5) for seed in range(2)]), {})
    assert "| a\\|b |" in text


def test_blind_sheets_show_letters_alone_and_the_key_is_apart(tmp_path):
    """Each method's images have a colour of its own, from which the key can be checked."""
    colours = {"lora": (200, 0, 0), "nora": (0, 200, 0), "dora": (0, 0, 200)}
    observations = [observation(name, "toy", seed, 0.5, task="subject") for name in colours for seed in range(4)]
    for one in observations:
        folder = tmp_path / one.cell / EVALUATION / "subject"
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 64), colours[one.variant]).save(folder / f"{index}.png")
    sheets = write_sheets(observations, tmp_path)
    key = json.loads((tmp_path / BLIND / KEY).read_text())
    assert len(sheets) == 4
    assert len({tuple(rows.values()) for rows in key.values()}) > 1
    for sheet in sheets:
        pixels = np.asarray(Image.open(sheet).convert("RGB"))
        first_row = {name: (pixels == colour).all(axis=-1).any(axis=1).argmax() for name, colour in colours.items()}
        assert sorted(colours, key=first_row.__getitem__) == list(key[sheet.stem].values())
    ratings = list(csv.DictReader((tmp_path / BLIND / RATINGS).open()))
    assert len(ratings) == 12
    assert not any(name in Path(tmp_path / BLIND / RATINGS).read_text() for name in colours)


def test_seconds_of_a_subject_are_those_of_calibration_and_steps_without_the_measurements(tmp_path):
    plan = [{"name": "calibrating", "seconds": 3.0}, {"name": "training", "seconds": 99.0}]
    RunStatus(state="done", plan=[PlannedPhase(**phase) for phase in plan]).write(tmp_path)
    lines = [(0, 100.0, "heldout_loss", 0.9), (1, 102.0, "loss", 0.8), (2, 104.0, "loss", 0.8), (2, 110.0, "heldout_loss", 0.7)]
    lines += [(3, 111.0, "loss", 0.6), (3, 117.0, "heldout_loss", 0.5)]
    logged = [{"step": step, "time": time, name: value} for step, time, name, value in lines]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert loss_curve(tmp_path) == [(3.0, 0.9), (7.0, 0.7), (8.0, 0.5)]


def test_ratings_that_somebody_has_filled_in_are_not_replaced(tmp_path):
    one = observation("lora", "toy", 0, 0.5, task="subject")
    (tmp_path / one.cell / EVALUATION / "subject").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / one.cell / EVALUATION / "subject" / "0.png")
    (tmp_path / BLIND).mkdir()
    (tmp_path / BLIND / RATINGS).write_text("filled in")
    write_sheets([one], tmp_path)
    assert (tmp_path / BLIND / RATINGS).read_text() == "filled in"


def test_results_that_another_arena_wrote_until_the_directory_was_free_are_kept(tmp_path, monkeypatch):
    result = CellResult("few-shot", "cats", "lora", "sweep", 0.01, None, "key", "done", None)

    @contextmanager
    def used_until_now(folder):
        CellResults(folder).add(result)
        yield

    monkeypatch.setattr("training.arena.locked", used_until_now)
    flags = ["--datasets", "digits", "--methods", "zeroshot", "--report_only", "--output_dir", str(tmp_path / "arena")]
    main(parse_arena_options(flags))
    assert read_results(tmp_path / "arena" / RESULTS) == [result]


@pytest.mark.slow(60)
def test_an_arena_of_both_tasks_trains_reports_and_does_nothing_again(tiny_model, images_dir, tmp_path):
    classes = write_files(tmp_path / "classes", class_files({"cats": 8, "dogs": 8}))
    variant, refused = "lora:learning_rate=0.01", "loftq"
    flags = [
        *("--subjects_dir", str(images_dir), "--datasets", str(classes), "--methods", variant, refused, "zeroshot"),
        *("--pretrained_model_name_or_path", str(tiny_model), "--subject_flags", "--num_evaluation_images 1"),
        *("--seeds", "0", "--shots", "1", "--max_train_steps", "2", "--no_base_to_new", "--num_workers", "2"),
        *("--output_dir", str(tmp_path / "arena")),
    ]
    run = main(parse_arena_options(flags))
    report = ArenaReport.read(run.path)
    measured = {(one.task, one.variant): set(one.values) for one in report.observations}
    assert measured.keys() == {("subject", variant), ("few-shot", variant), ("few-shot", "zeroshot")}
    assert measured["subject", variant] == {one.name for one in MEASURES["subject"]}
    assert measured["few-shot", variant] >= {"top1", "calibration_error", "below_zero_shot", "seconds_to_quality"}
    assert report.failed.keys() == {"subject/loftq", "few-shot/loftq"}
    (subject,) = (one for one in report.observations if one.task == "subject")
    assert base_model(report, "subject")[None].value == pytest.approx(subject.curve[0][1])
    assert run.status().state == "done"
    written = {path: path.stat().st_mtime_ns for path in run.path.glob("cells/**/status.json")}
    main(parse_arena_options(flags))
    assert {path: path.stat().st_mtime_ns for path in run.path.glob("cells/**/status.json")} == written
