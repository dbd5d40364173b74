"""The schedule of an arena: what can run when, what is never run again, and which data a learning rate is chosen on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.errors import InputError
from pipelines.images import Image
from training.comparison.cells import Cell
from training.comparison.rates import MAX_EXTENSIONS
from training.comparison.results import CellResults, read_results, result_of
from training.comparison.schedule import Schedule
from training.comparison.tasks import FewShotArena, SubjectArena, check_flags
from training.comparison.variants import MethodVariant, variants_of
from training.options.arena import ArenaOptions, parse_arena_options
from training.runs.arena_files import RESULTS, CellResult, Observation

PHOTOS = ["a.png", "b.png", "c.png", "d.png", "e.png"]


@pytest.fixture
def subjects(tmp_path):
    """Three subjects of five photos."""
    for number, name in enumerate(("bear", "candle", "robot")):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for index, photo in enumerate(PHOTOS):
            Image.new("RGB", (80, 80), (40 * index, 60 * number, 90)).save(tmp_path / "subjects" / name / photo)
    return tmp_path / "subjects"


def options_of(*flags) -> ArenaOptions:
    return parse_arena_options([*map(str, flags)])


def schedule_of(arena, tasks, options, **more):
    return Schedule(CellResults(arena, **more), tasks, variants_of(options.method.methods), options.method, options.data.seeds)


def end(schedule, cell, score=None, **more):
    """Add the result of a cell that has ended."""
    schedule.results.add(CellResult(**cell.description(), key=cell.key, score=score, **{"state": "done", **more}))


def flags_of(cell: Cell):
    """The values of the flags of a cell, by name."""
    words, values = list(cell.flags), {}
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            values[name] = []
        else:
            values[name].append(word)
    return {name: " ".join(given) for name, given in values.items()}


def test_every_rate_is_swept_before_anything_is_measured(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects, "--methods", "lora", "--seeds", 0, 1)
    schedule = schedule_of(tmp_path / "arena", [SubjectArena.create(options)], options)
    pending = schedule.pending()
    assert {cell.purpose for cell in pending} == {"sweep"}
    assert len(pending) == 3 * len(options.method.learning_rate_factors)


def test_a_cell_that_chooses_the_rate_of_several_subjects_counts_once(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects, "--methods", "lora", "--seeds", 0, 1)
    schedule = schedule_of(tmp_path / "arena", [SubjectArena.create(options)], options)
    sweep = schedule.pending()
    end(schedule, sweep[0], 0.5)
    assert schedule.progress() == (1, len(sweep) + 3 * 2)


def test_the_rate_of_a_subject_is_chosen_on_the_other_subjects(subjects, tmp_path):
    """Rates whose order differs between the subjects: each gets the best one of the others."""
    options = options_of("--subjects_dir", subjects, "--methods", "lora", "--seeds", 0)
    task = SubjectArena.create(options)
    schedule = schedule_of(tmp_path / "arena", [task], options)
    (variant,) = schedule.variants
    default = task.default_rate(variant)
    best = {"bear": default, "candle": default, "robot": 3 * default}
    for cell in schedule.pending():
        end(
            schedule,
            cell,
            0.1
            if cell.learning_rate == pytest.approx(best[cell.dataset])
            else 0.1 + 0.1 * abs(cell.learning_rate - best[cell.dataset]) / default,
        )
    finals = {cell.dataset: cell.learning_rate for cell in schedule.pending() if cell.purpose == "final"}
    assert finals["robot"] == pytest.approx(default)


def test_no_photo_that_is_tested_is_seen_by_the_sweep_of_a_single_subject(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora")
    task = SubjectArena.create(options)
    (variant,) = variants_of(["lora"])
    for seed in options.data.seeds:
        (final,) = [cell for cell in task.final_cells(variant, "bear", [1e-3] * 5, 10) if cell.seed == seed]
        (sweep,) = task.sweep_cells(variant, "bear", seed, 1e-3, 10)
        tested, swept = flags_of(final)["heldout_image"], flags_of(sweep)
        assert swept["excluded_images"] == tested
        assert swept["heldout_image"] != tested
    tests = {flags_of(cell)["heldout_image"] for cell in task.final_cells(variant, "bear", [1e-3] * 5, 10)}
    assert tests == set(PHOTOS)


def test_an_end_of_the_sweep_that_is_best_is_extended(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora", "--seeds", 0)
    schedule = schedule_of(tmp_path / "arena", [SubjectArena.create(options)], options)
    rounds = 0
    while {cell.purpose for cell in schedule.pending()} == {"sweep"}:
        rounds += 1
        for cell in schedule.pending():
            end(schedule, cell, 1 / (1 + cell.learning_rate))
    assert rounds == 1 + MAX_EXTENSIONS
    (final,) = schedule.pending()
    tried = [one.learning_rate for one in read_results(tmp_path / "arena" / RESULTS)]
    assert final.learning_rate == pytest.approx(max(tried))


def test_what_has_ended_is_never_pending_again(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora:learning_rate=0.001", "--seeds", 0, 1)
    task = SubjectArena.create(options)
    schedule = schedule_of(tmp_path / "arena", [task], options)
    first, second = schedule.pending()
    end(schedule, first, 0.5)
    assert schedule.pending() == [second]
    assert schedule_of(tmp_path / "arena", [task], options).pending() == [second]


def test_a_failed_method_has_its_reason_and_runs_again_on_request_alone(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora:learning_rate=0.001", "--seeds", 0)
    task = SubjectArena.create(options)
    schedule = schedule_of(tmp_path / "arena", [task], options)
    (cell,) = schedule.pending()
    end(schedule, cell, state="failed", reason="error: no memory")
    assert not schedule.pending()
    assert schedule.failures(task, schedule.variants[0]) == ["final on bear: error: no memory"]
    assert not schedule_of(tmp_path / "arena", [task], options).pending()
    assert schedule_of(tmp_path / "arena", [task], options, retry_failed=True).pending() == [cell]


def test_a_failed_cell_starts_with_new_attempts_and_a_stopped_one_with_its_record(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora:learning_rate=0.001", "--seeds", 0)
    (cell,) = schedule_of(tmp_path, [SubjectArena.create(options)], options).pending()
    first = cell.record_to_start(tmp_path)
    cell.folder(tmp_path).mkdir(parents=True)
    for state, attempts in (("running", 2), ("failed", 0)):
        replace(first, state=state, attempts=2).write(cell.folder(tmp_path))
        assert cell.record_to_start(tmp_path).attempts == attempts


def test_results_of_another_arena_are_taken_over_under_its_own_names(subjects, tmp_path):
    """The same photos in a folder of another name, and the same method with its default written out."""
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora:learning_rate=0.001", "--seeds", 0)
    first = schedule_of(tmp_path / "first", [SubjectArena.create(options)], options)
    (cell,) = first.pending()
    measured = Observation("subject", "bear", "lora:learning_rate=0.001", None, 0, {"heldout_loss": 0.123456789}, "cells/x")
    end(first, cell, observations=(measured,))
    (subjects / "bear").rename(subjects / "teddy")
    flags = ["--subjects_dir", subjects / "teddy", "--methods", "lora:learning_rate=0.001,rank=4", "--class_words", "teddy=bear"]
    options = options_of(*flags, "--seeds", 0, 1)
    others = [tmp_path / "first" / RESULTS]
    second = schedule_of(tmp_path / "second", [SubjectArena.create(options)], options, others=others)
    assert [one.seed for one in second.pending()] == [1]
    (observation,) = second.observations()
    assert (observation.dataset, observation.variant) == ("teddy", "lora:learning_rate=0.001,rank=4")
    assert observation.values == {"heldout_loss": 0.123457}
    second.results.write()
    assert len(read_results(tmp_path / "second" / RESULTS)) == 1


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_cell_that_failed_keeps_the_checkpoints_that_it_can_be_resumed_from(state, subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora", "--seeds", 0)
    cell, *_ = schedule_of(tmp_path, [SubjectArena.create(options)], options).pending()
    (cell.folder(tmp_path) / "checkpoints" / "step-000001").mkdir(parents=True)
    lines = [json.dumps({"step": step, "heldout_loss": loss}) for step, loss in ((0, 0.8), (9, 0.6))]
    (cell.folder(tmp_path) / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    result = result_of(cell, replace(cell.record_to_start(tmp_path), state=state), tmp_path)
    assert result.score == (pytest.approx(0.75) if state == "done" else None)
    assert (cell.folder(tmp_path) / "checkpoints").exists() == (state == "failed")


def test_the_results_in_benchmarks_can_be_taken_over():
    for path in (Path(__file__).parents[2] / "benchmarks" / "results").iterdir():
        assert {one.state for one in read_results(path)} <= {"done", "failed"}


@pytest.mark.parametrize(("content", "message"), [(None, "is no file"), ("{}", "lacks 'task'"), ("[1", "cannot be read")])
def test_a_file_that_has_no_results_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / RESULTS).write_text(content)
    with pytest.raises(InputError, match=message):
        CellResults(tmp_path / "arena", [tmp_path / RESULTS])


def test_a_method_whose_every_rate_fails_is_a_row_with_its_reason(subjects, tmp_path):
    options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora", "--seeds", 0)
    task = SubjectArena.create(options)
    schedule = schedule_of(tmp_path / "arena", [task], options)
    while schedule.pending():
        end(schedule, schedule.pending()[0], state="failed", reason="loss is not finite")
    assert schedule.failures(task, schedule.variants[0]) == ["sweep on bear: loss is not finite"]


def test_a_budget_of_seconds_is_turned_into_steps_by_the_measured_pace(subjects, tmp_path):
    options = options_of(
        "--subjects_dir", subjects / "bear", "--methods", "lora:learning_rate=0.001", "--seeds", 0, "--max_train_seconds", 30
    )
    schedule = schedule_of(tmp_path / "arena", [SubjectArena.create(options)], options)
    (pace,) = schedule.pending()
    assert pace.purpose == "pace"
    end(schedule, pace, seconds_per_step=0.25)
    (final,) = schedule.pending()
    assert flags_of(final)["max_train_steps"] == "120"


def test_another_image_or_option_is_another_cell(subjects):
    def key(*flags):
        options = options_of("--subjects_dir", subjects / "bear", "--methods", "lora", *flags)
        return (
            SubjectArena.create(options)
            .final_cells(*variants_of(["lora"]), "bear", [1e-3] * 5, options.method.max_train_steps)[0]
            .key
        )

    before = key()
    assert key() == before
    assert key("--max_train_steps", 7) != before
    assert key("--subject_flags", "--snr_gamma 5") != before


def test_labelled_datasets_sweep_on_more_validation_images_and_never_on_test_images(tmp_path):
    options = options_of("--datasets", "digits", "--methods", "lora", "--shots", 1, 4, "--seeds", 0, 1)
    task = FewShotArena.create(options)
    (variant,) = variants_of(["lora"])
    (sweep,) = task.sweep_cells(variant, "digits", 0, 0.01, 10)
    flags = flags_of(sweep)
    assert (flags["shots"], flags["seeds"], flags["num_validation_images"]) == ("4", "0", "30")
    final, new = task.final_cells(variant, "digits", [0.01, 0.01], 10)
    assert flags_of(final)["shots"] == "1 4"
    assert "base_to_new" in flags_of(new)


def test_a_baseline_is_measured_without_a_sweep_and_not_on_subjects(subjects, tmp_path):
    options = options_of("--datasets", "digits", "--subjects_dir", subjects / "bear", "--methods", "zeroshot")
    tasks = [SubjectArena.create(options), FewShotArena.create(options)]
    pending = schedule_of(tmp_path / "arena", tasks, options).pending()
    assert [(cell.task, cell.purpose) for cell in pending] == [("few-shot", "final"), ("few-shot", "base-to-new")]


def test_variants_are_written_as_names_with_options():
    variant = MethodVariant.parse("nora:basis=gradient,rank=16")
    assert variant.flags() == ["--method", "nora", "--basis", "gradient", "--rank", "16"]
    assert [one.label for one in variants_of(["lora", "lora"])] == ["lora"]
    assert len(variants_of(["all"])) > 30


@pytest.mark.parametrize(
    ("label", "message"),
    [("magic", "must each begin with one of"), ("lora:rank", "name:option=value"), ("lora:=3", "name:option=value")],
)
def test_wrong_variants_are_refused(label, message):
    with pytest.raises(InputError, match=message):
        MethodVariant.parse(label)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subject_flags=--seed 3"], "must not set --seed"),
        (["--fewshot_flags=--rank 3"], "must not set --rank, an option of methods"),
    ],
)
def test_flags_that_the_arena_sets_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        check_flags(options_of("--datasets", "digits", *flags))


def test_a_subject_with_two_photos_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 80)).save(tmp_path / name)
    with pytest.raises(InputError, match="needs at least three photos"):
        SubjectArena.create(options_of("--subjects_dir", tmp_path))
