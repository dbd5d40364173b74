"""Directories of arenas, written without training."""

import random
import time

from PIL import Image

from pipelines.run_file import ResolvedOptions
from training.comparison.analysis import base_model_summaries, comparisons_of, summaries_of
from training.comparison.blind import write_sheets
from training.comparison.report import write_report
from training.comparison.verdict import verdict_of
from training.runs.arena_files import ArenaReport, CellRecord, Observation
from training.runs.record import RunRecord
from training.runs.run_files import RunStatus
from training.runs.subject_files import EVALUATION

FAILED = {"subject/loftq": "sweep on toy: InputError: loftq needs --quantize nf4, got no."}
# Methods by quality relative to the first, and their parameters.
METHODS = {
    "lora": (1.0, 94_720), "dora": (1.01, 99_328), "nora": (0.97, 20_480), "vera": (0.9, 8_192), "lora:rank=1": (0.93, 23_680),
    "lokr": (0.95, 31_104), "hra": (0.88, 47_360), "linear_probe": (0.85, 1_930),
}  # fmt: skip


def observations(methods=METHODS, seeds=5, shots=(1, 2, 4, 8, 16)):
    """Values of every measure, better for a method with a higher quality."""
    rng = random.Random(0)
    for method, (quality, parameters) in methods.items():
        costs = {"parameters": parameters, "bytes": 4 * parameters, "seconds": 60.0 + parameters / 3000, "peak_memory": 1100.0}
        for dataset in ("toy", "coffee mug") if method != "linear_probe" else ():
            for seed in range(seeds):
                near = quality + 0.12 * rng.random()
                values = {"heldout_loss": 0.4 - 0.2 * near, "image_similarity": 0.7 * near, "text_similarity": 0.3 / near}
                values |= {"copying": 0.1 * near, "drift": 0.2 * near, **costs}
                cell, curve = f"cells/subject/{dataset}/{method}/final-{seed}", [(0.0, 0.4), (60.0, values["heldout_loss"])]
                yield Observation("subject", dataset, method, None, seed, values, cell, curve)
        for dataset in ("digits", "coloured-shapes"):
            for number in shots:
                for seed in range(seeds):
                    top1 = min(0.99, quality * (0.4 + 0.13 * number**0.5) + 0.03 * rng.random())
                    values = {
                        "top1": top1,
                        "calibration_error": 0.1 * rng.random(),
                        "below_zero_shot": float(top1 < 0.45),
                        **costs,
                    }
                    values |= {"harmonic_mean": 0.4 * quality} if number == max(shots) and method != "linear_probe" else {}
                    yield Observation(
                        "few-shot", dataset, method, number, seed, values, f"cells/few-shot/{dataset}/{method}/final"
                    )


def arena_in(folder, state="done", seeds=5, methods=METHODS, failed=FAILED, **status):
    """An arena with results for both tasks, blind sheets and a method that failed; returns its record."""
    folder.mkdir(parents=True)
    data = {"subjects_dir": "/srv/subjects", "class_words": ["toy=toy", "coffee mug=coffee mug"], "datasets": ["digits"]}
    ResolvedOptions({"data": data, "method": {"methods": list(METHODS)}, "models": {}, "output": {}}).write(folder)
    given = list(observations(methods, seeds))
    for index, one in enumerate(given):
        if one.task == "subject":
            images = folder / one.cell / EVALUATION / "subject"
            images.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (64, 64), (31 * index % 256, 60 * number, 128)).save(images / f"{number}.png")
    summaries = summaries_of(given)
    base_model = base_model_summaries(given, ["lora"])
    report = ArenaReport(
        list(methods), 200, None, given, summaries, comparisons_of(given, summaries), failed=failed, base_model=base_model
    )
    verdict = {task: verdict_of(report, task) for task in ("subject", "few-shot")}
    write_report(ArenaReport(**{**vars(report), "verdict": verdict}), folder, {"subject": [], "few-shot": []})
    write_sheets(given, folder)
    ended = {"state": state, "phase": "fitting", "step": 12, "total": 40, "share": 0.3, "seconds_left": 900.0}
    RunStatus(**ended | {"heartbeat": time.time(), **status}).write(folder)
    return RunRecord(folder)


def running_cell(arena, variant="nora"):
    """Add a training that runs."""
    record = CellRecord("subject", "toy", variant, "sweep", 0.01, 0, [], "running")
    folder = arena / "cells" / "subject" / "toy" / variant / "sweep-1"
    folder.mkdir(parents=True)
    record.write(folder)
