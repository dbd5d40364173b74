"""The dry run leaves everything as it was and measures what it says; the ladder finds the first setting that fits."""

import dataclasses
import json
import mmap

import pytest
import torch
from accelerate import Accelerator
from regression import STEPS, trainable, trained

from pipelines.errors import InputError
from training.engine import memory_fallback
from training.engine.dry_run import DoesNotFitError, PeakMemory, measure_steps
from training.engine.loop import LoopOptions, prepared
from training.engine.memory_fallback import advice, as_flags, fallback_settings, find_fitting, with_memory_fallback
from training.options import SubjectOptions, parse_options
from training.runs.record import list_checkpoints
from training.runs.run import RunDirectory
from training.runs.run_files import FallbackStep, MemoryFallback


def rehearsed(folder, what, limit=None, peak=None, **changes):
    run = RunDirectory.create(folder, {})
    with prepared(Accelerator(cpu=True), run, what, LoopOptions(STEPS, checkpointing_steps=2, **changes)) as stepper:
        return measure_steps(stepper, limit, peak)


def test_a_dry_run_does_not_change_the_training_after_it(tmp_path):
    expected = trained(tmp_path / "without", trainable())
    what = trainable()
    rehearsed(tmp_path / "with", what)
    assert torch.equal(trained(tmp_path / "with", what), expected)
    shadow = (list_checkpoints(tmp_path / name / "checkpoints")[-1] / "state.pt" for name in ("without", "with"))
    averages = [torch.load(path, weights_only=True)["ema"]["shadow_params"] for path in shadow]
    assert all(torch.equal(*pair) for pair in zip(*averages, strict=True))


def test_a_dry_run_trains_real_steps(tmp_path, monkeypatch):
    what, seen = trainable(), []
    step = what.optimizer.step
    monkeypatch.setattr(what.optimizer, "step", lambda *rest: seen.append(step(*rest)))
    rehearsed(tmp_path, what)
    assert len(seen) == 3


def test_a_dry_run_reports_the_cost_of_the_run(tmp_path):
    report = rehearsed(tmp_path, trainable(), checkpoints_total_limit=3)
    assert report.num_trainable_parameters == 8
    assert report.seconds == pytest.approx(STEPS * report.seconds_per_step)
    # Weights, two moments and a moving average of float32, and the count of steps of each of two parameters.
    assert report.checkpoint == 4 * 8 * 4 + 2 * 4
    assert report.disk == 5 * report.checkpoint
    assert json.loads((tmp_path / "dry_run.json").read_text()) == report.to_json()
    assert "8 trainable parameters" in report.summary()


def take_memory(size):
    """Write to `size` bytes of new memory and free it; an allocator may reuse memory that the process already has."""
    with mmap.mmap(-1, size) as memory:
        memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)


def test_peak_memory_includes_memory_that_was_freed_again():
    before = PeakMemory(torch.device("cpu")).read()
    peak = PeakMemory(torch.device("cpu"))
    take_memory(4 << 25)
    highest = peak.read()
    assert highest - before == pytest.approx(4 << 25, rel=0.2)
    assert PeakMemory(torch.device("cpu")).read() < highest - (2 << 25)


def test_memory_used_before_the_steps_counts_if_its_measurement_is_given(tmp_path):
    alone = rehearsed(tmp_path / "alone", trainable())
    peak = PeakMemory(torch.device("cpu"))
    take_memory(4 << 25)
    both = rehearsed(tmp_path / "both", trainable(), peak=peak)
    assert both.peak_memory - alone.peak_memory > 2 << 25


def test_a_run_that_needs_more_memory_than_the_limit_does_not_fit(tmp_path):
    with pytest.raises(DoesNotFitError, match=r"needs \d+\.\d+ GB of memory, but memory_limit_gb is 0\.001"):
        rehearsed(tmp_path, trainable(), limit=0.001)


def test_more_disk_than_is_free_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("training.engine.dry_run.free_bytes", lambda folder: 10)
    with pytest.raises(InputError, match=r"of disk space.*lower --checkpoints_total_limit"):
        rehearsed(tmp_path, trainable())


OPTIONS = {
    "model": {"gradient_checkpointing": False, "quantize": None},
    "optimisation": {"train_batch_size": 6, "gradient_accumulation_steps": 1, "use_8bit_adam": False},
    "output": {"output_dir": "x", "memory_fallback": True, "dry_run": False, "hub": None},
}


def test_settings_that_cost_time_are_tried_before_settings_that_cost_quality():
    assert list(fallback_settings(OPTIONS, 1024)) == [
        {"gradient_checkpointing": True},
        {"train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"train_batch_size": 1, "gradient_accumulation_steps": 6},
        {"use_8bit_adam": True},
        {"quantize": "nf4"},
        {"resolution": 768},
        {"resolution": 512},
    ]


def test_settings_that_the_run_has_already_or_does_not_know_are_not_tried():
    options = {
        "model": {"gradient_checkpointing": True},
        "optimisation": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
    }
    assert list(fallback_settings(options, None)) == []


def test_flags_made_from_options_parse_to_the_same_options():
    flags = ["--method", "lora", "--rank", "8", "--random_flip", "--validation_prompt", "a b", "c", "--memory_fallback", "false"]
    options = parse_options(flags)
    values = {name: value for group in options.to_dict().values() for name, value in group.items()}
    assert parse_options(as_flags(values)).to_dict() == options.to_dict()


RECIPE = """
import argparse, pathlib, sys
from training.runs.run_files import DryRunReport
parser = argparse.ArgumentParser()
for name in ("gradient_checkpointing", "memory_fallback", "dry_run"):
    parser.add_argument("--" + name, type=lambda text: text == "True")
for name in ("train_batch_size", "gradient_accumulation_steps"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--use_8bit_adam")
parser.add_argument("--output_dir", type=pathlib.Path)
options = parser.parse_args()
assert options.dry_run and not options.memory_fallback
if options.use_8bit_adam == "True":
    raise SystemExit("error: bitsandbytes is not installed")
peak = 100 * options.train_batch_size - 50 * bool(options.gradient_checkpointing)
options.output_dir.mkdir()
if peak > 700:
    raise SystemExit("error: CUDA out of memory. Tried to allocate")
DryRunReport(1, 0.5, 1.0, peak, 1, 1, 1, None).write(options.output_dir)
if peak > LIMIT:
    raise SystemExit("error: does not fit")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose memory is a formula, 100 an image and 50 less with checkpointing; `recipe(limit)` is its name."""

    def of(limit):
        (tmp_path / "formula.py").write_text(RECIPE.replace("LIMIT", str(limit)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "formula"

    return of


def test_settings_are_added_until_the_run_fits(recipe, tmp_path):
    tried = find_fitting(recipe(300), OPTIONS, None, tmp_path)
    assert [(step.flags, step.fits, step.peak_memory) for step in tried] == [
        ({"gradient_checkpointing": True}, False, 550),
        ({"gradient_checkpointing": True, "train_batch_size": 3, "gradient_accumulation_steps": 2}, True, 250),
    ]
    assert "--gradient_checkpointing True --train_batch_size 3 --gradient_accumulation_steps 2" in advice(tried)


def test_settings_that_fail_for_another_reason_than_memory_are_left_out_of_later_attempts(recipe, tmp_path):
    options = {**OPTIONS, "optimisation": OPTIONS["optimisation"] | {"train_batch_size": 8, "quantize": None}}
    tried = find_fitting(recipe(10), options, None, tmp_path)
    assert [step.peak_memory for step in tried] == [None, 350, 150, 50, None, None]
    assert "use_8bit_adam" in tried[-2].flags
    assert "bitsandbytes is not installed" in tried[-2].reason
    assert "use_8bit_adam" not in tried[-1].flags
    assert "None of the settings of the memory fallback fits" in advice(tried)


def options_in(folder, **changes):
    options = SubjectOptions()
    options.output = dataclasses.replace(options.output, output_dir=str(folder), **changes)
    RunDirectory.create(folder, {}).update_status(resolution=64)
    return options


def out_of_memory(options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_running_out_of_memory_starts_the_fallback_and_the_error_names_the_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory_fallback,
        "find_fitting",
        lambda recipe, options, resolution, folder: [FallbackStep({"resolution": resolution // 2}, True, 1, 2)],
    )
    with pytest.raises(InputError, match=r"does not fit into memory: CUDA out of memory.*These flags fit: --resolution 32 "):
        with_memory_fallback(out_of_memory, options_in(tmp_path), "recipe")
    assert json.loads((tmp_path / MemoryFallback.NAME).read_text())["attempts"][0]["fits"]
    assert "--resolution 32" in RunDirectory(tmp_path).status().error


def test_without_memory_fallback_no_settings_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_fallback, "find_fitting", lambda *_: pytest.fail("tried settings"))
    with pytest.raises(InputError, match=r"does not fit into memory: CUDA out of memory"):
        with_memory_fallback(out_of_memory, options_in(tmp_path, memory_fallback=False), "recipe")


def test_other_errors_do_not_start_the_fallback(tmp_path):
    def broken(options):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        with_memory_fallback(broken, options_in(tmp_path), "recipe")
