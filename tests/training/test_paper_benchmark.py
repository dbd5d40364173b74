"""The benchmark that repeats the paper's experiments: its commands, its tables, and what it does not repeat."""

import json
import shlex

import paper
import pytest

from pipelines.errors import InputError
from pipelines.fewshot.metric_values import Interval
from training.arena import schedule_of
from training.options import parse_options
from training.options.arena import parse_arena_options
from training.options.fewshot import parse_fewshot_options
from training.runs.arena_files import ArenaReport, MeasureSummary
from training.runs.run import RunDirectory


@pytest.fixture
def subjects(tmp_path, images_dir):
    folder = tmp_path / "subjects"
    folder.mkdir()
    (folder / "candle").symlink_to(images_dir)
    return folder


@pytest.fixture
def options(tmp_path, subjects):
    """All experiments, with their runs in a new folder."""
    return paper.BenchmarkOptions("DATA", str(subjects), output_dir=str(tmp_path / "runs"))


def test_every_command_is_one_of_the_recipe_without_unused_flags(options):
    runs = paper.fewshot_runs(options).values()
    assert len(runs) == len({run.path for run in runs}) == 3 * len(paper.SETTINGS)
    for run in runs:
        parsed = parse_fewshot_options(run.command[3:])
        assert parsed.output.output_dir == str(run.path)
        assert parsed.method.unused() == []
        assert {parsed.adapter(name).create().name for name in parsed.method.adapters()} <= {"lora", "nora"}


def test_the_arena_of_the_subjects_trains_every_seed_at_full_size_without_a_sweep(options):
    schedule = schedule_of(parse_arena_options(paper.subject_command(options)[3:]))
    cells = schedule.pending()
    assert schedule.refused == {}
    assert [cell.purpose for cell in cells] == ["final"] * 6
    assert [(cell.variant.partition(":")[0], cell.seed) for cell in cells] == [
        (m, s) for m in ("lora", "nora") for s in (1, 2, 3)
    ]
    for cell in cells:
        parsed = parse_options(cell.flags)
        assert parsed.unused() == []
        assert (parsed.data.resolution, parsed.optimisation.max_train_steps) == (1024, 500)


def test_the_scaling_of_both_adapters_is_that_of_the_authors_codes(options):
    """Both divide alpha = 1 by their rank, which for NoRA is the outer one: here alpha is divided by the inner rank."""
    runs = paper.fewshot_runs(options)
    lora, nora = (parse_fewshot_options(runs["dtd", name].command[3:]).adapter(name) for name in ("lora", "nora"))
    assert lora.alpha / lora.rank == 1 / 2
    assert nora.alpha / nora.inner_r == pytest.approx(1 / nora.rank, rel=1e-3)


def test_a_dry_run_prints_the_commands_and_starts_none(options, monkeypatch, capsys):
    for name in ("run_cell", "train_subjects"):
        monkeypatch.setattr(paper, name, lambda *_: pytest.fail("a run was started"))
    options.dry_run = True
    paper.main(options)
    printed = capsys.readouterr().out.splitlines()
    commands = [*(run.command for run in paper.fewshot_runs(options).values()), paper.subject_command(options)]
    assert [shlex.split(line) for line in printed] == commands


def finish(run, accuracies):
    """Write the files of a finished run with these mean accuracies by method and shots."""
    directory = RunDirectory.create(run.path, {})
    interval = {"low": 0.0, "high": 0.0}
    rest = dict.fromkeys(("calibration_error", "calibrated_calibration_error", "num_trainable_parameters"), 0.0)
    rest |= dict.fromkeys(("stored_bytes", "seconds", "peak_memory"), 0.0)
    summary = [
        {"shots": shots, "method": method, "num_seeds": 3, "top1": interval | {"value": value, "low": value - 0.01,
         "high": value + 0.01}, **rest}
        for (method, shots), value in accuracies.items()
    ]  # fmt: skip
    dataset = {"name": "d", "classes": [], "new_classes": [], "images": 0, "duplicates": []}
    content = {"version": 2, "dataset": dataset, "model": "m", "pretrained": None, "templates": [], "shots": [], "seeds": []}
    content |= {"methods": [], "trials": [], "summary": summary, "classifier": ""}
    (run.path / "report.json").write_text(json.dumps(content))
    directory.update_status(state="done", num_trainable_parameters=7, seconds=3.0)


def test_finished_runs_are_not_repeated_and_stand_beside_the_published_figures(options, monkeypatch, capsys, tmp_path):
    started = []

    def run_cell(folder, record, *_):
        if not paper.is_finished(folder):
            started.append((record.dataset, record.variant))
            return type(record)(**{**vars(record), "state": "failed", "reason": "no such GPU"})
        return record

    monkeypatch.setattr(paper, "run_cell", run_cell)
    finish(paper.fewshot_runs(options)["dtd", "lora"], {("lora", 4): 0.625, ("lora", 16): 0.7})
    arena = RunDirectory.create(tmp_path / "arena", {})
    loss = MeasureSummary("subject", None, "lora", None, "heldout_loss", Interval(0.5, 0.25, 0.75), 4)
    ArenaReport([], 500, None, summaries=[loss], failed={"subject/nora": "no such GPU"}).write(arena.path)
    monkeypatch.setattr(paper, "train_subjects", lambda _: arena)
    figures = tmp_path / "published.csv"
    figures.write_text("method,dataset,shots,accuracy\nnora,dtd,16,70.5\n")
    options.published = str(figures)
    paper.main(options)
    printed = capsys.readouterr().out
    assert "| shots | method | Food101 | OxfordPets | DTD |" in printed
    assert "| 4 | LoRA | - (82.7) | - (91.0) | 62.5 ± 1.0 (63.8) |" in printed
    assert "| 16 | LoRA | - (-) | - (-) | 70.0 ± 1.0 (-) |" in printed
    assert "| 16 | NoRA | - (-) | - (-) | - (70.5) |" in printed
    assert "| LoRA | 0.5000 (0.2500 to 0.7500) |" in printed
    assert "- subject/nora: no such GPU\n" in printed
    assert len(started) == 8
    assert ("dtd", "lora") not in started
    assert printed.count("` failed: no such GPU") == 8


def test_subjects_all_of_whose_runs_failed_are_reported_with_the_reasons(options, monkeypatch, capsys, tmp_path):
    arena = RunDirectory.create(tmp_path / "arena", {})
    ArenaReport([], 500, None, failed={"subject/lora": "no such GPU", "subject/nora": "no such GPU"}).write(arena.path)
    monkeypatch.setattr(paper, "train_subjects", lambda _: arena)
    options.tables = ["subjects"]
    paper.main(options)
    printed = capsys.readouterr().out
    assert "- subject/lora: no such GPU\n- subject/nora: no such GPU\n" in printed


def test_options_that_cannot_be_used_are_refused(options, tmp_path):
    with pytest.raises(InputError, match=r"'fewshot' needs --dataset_root. Give it, or leave the table out of --tables"):
        paper.BenchmarkOptions(tables=["fewshot"])
    with pytest.raises(InputError, match=r"tables must be any of fewshot, subjects, got 'language'"):
        paper.BenchmarkOptions(tables=["language"])
    figures = tmp_path / "published.csv"
    figures.write_text("method,dataset,accuracy\nnora,dtd,70.5\n")
    options.published = str(figures)
    with pytest.raises(InputError, match=r"must have the columns method, dataset, shots, accuracy, but a line has no shots"):
        paper.published_figures(options)
