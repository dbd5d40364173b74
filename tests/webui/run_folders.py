"""Run directories in every state, written without a model library."""

import json
import math
import random
import subprocess
from pathlib import Path

import psutil
from PIL import Image

from pipelines.fewshot.metric_values import Interval
from pipelines.images import save_image
from pipelines.run_file import ResolvedOptions
from training.runs.fewshot_files import DatasetSummary, FewShotReport, MethodSummary
from training.runs.record import RunRecord
from training.runs.run_files import METRICS, LoggedMetrics, RunStatus
from training.subject.checkpoint_selection import Point, StepScores, suggest
from training.subject.measured import adapter_at, metric_name

HALF = Interval(0.5, 0.4, 0.6)
PROMPTS = ("a photo of sks toy", "sks toy <b>in the snow</b>", "sks toy at night")
SETTINGS = {"negative_prompt": "", "num_inference_steps": 2, "guidance_scale": 4.0, "sampler": "Euler", "model": "mini"}
CURVE_STEPS, SAMPLE_STEPS = (0, 20, 40, 60, 80, 100), (0, 40, 60, 100)
GIVEN = {"data": {"instance_prompt": PROMPTS[0]}, "output": {"validation_prompt": PROMPTS}}


class WrittenRun(RunRecord):
    """A run directory that a test writes."""

    def log(self, step, **values):
        """Append to metrics.jsonl as a run does."""
        with (self.path / METRICS).open("a") as lines:
            lines.write(LoggedMetrics(step, 0.0, values).line())


def process_of(state):
    """The status fields of a process that is alive or has ended."""
    if state in ("running", "starting", "queued"):
        sleeping = subprocess.Popen(["sleep", "600"])
        return {"pid": sleeping.pid, "pid_started": psutil.Process(sleeping.pid).create_time()}
    return {"pid": 2**22 + 1, "pid_started": 1.0}


def end_processes():
    """Kill the processes that `process_of` started."""
    for child in psutil.Process().children():
        if child.name() == "sleep":
            child.kill()
            child.wait()


def run_in(folder: Path, state="running", steps=0, total=100, **status) -> WrittenRun:
    """A subject run with `steps` of `total` logged, a falling training loss and a validation loss with a minimum.

    Args:
        state: the state in status.json; "interrupted" is a running one whose process has ended.
    """
    run = WrittenRun(folder)
    run.samples.mkdir(parents=True)
    ResolvedOptions(GIVEN).write(folder)
    rng = random.Random(0)
    for step in range(1, steps + 1):
        run.log(step, loss=1 + math.exp(-4 * step / total) + 0.3 * rng.random(), lr=1e-3 * min(1.0, step / 20))
    told = "running" if state == "interrupted" else state
    fields = {"state": told, "phase": "training", "step": steps, "total": total, "seconds_left": 42.0, "error": None, **status}
    (folder / RunStatus.NAME).write_text(json.dumps({**fields, **process_of(state)}))
    return run


def add_report(run, method="nora", top1=HALF, shots=4):
    """The report of a few-shot run with one method, as far as lists and comparisons read it."""
    summary = MethodSummary(shots, method, 1, top1, 0.1, 0.1, 12.0, 34.0, 5.5, 6.0)
    dataset = DatasetSummary("pets", ["cat", "dog"], [], 8, [])
    FewShotReport(dataset, "mini", None, ["a {}"], [shots], [0], [method], [], [summary], "").write(run.path)


def add_checkpoint(run, step):
    """Create an empty checkpoint folder."""
    (run.checkpoints / f"step-{step:07d}").mkdir(parents=True)


def add_samples(run, step, side=16, prompts=PROMPTS):
    """Write sample images of a step, whose colour depends on the step."""
    for place, prompt in enumerate(prompts):
        image = Image.new("RGB", (side, side), (step % 256, 60 * place, 128))
        save_image(image, run.samples_at(step) / f"{place}.png", {"prompt": prompt, "seed": place, "step": step, **SETTINGS})
    run.subject.mkdir(exist_ok=True)
    Image.new("RGB", (side, side), "red").save(run.subject / "0.png")


def curve(steps=CURVE_STEPS, turn=40):
    """A validation loss with its minimum at `turn`, and a training loss that keeps falling."""
    return [Point(step, 1.0 + 0.004 * abs(step - turn), 1.2 - 0.004 * step) for step in steps]


def scores(steps=SAMPLE_STEPS):
    """Scores of samples whose similarity rises and whose prompt adherence slowly falls."""
    return {step: StepScores(0.2 + 0.005 * step, 0.4 - 0.0002 * step, 0.3 + 0.002 * step, 0.4, 0.9) for step in steps}


def measure(run, points=None, scored=None):
    """Log losses and scores, and save an adapter at each of their steps."""
    points, scored = points or curve(), scored or scores()
    for point in points:
        run.log(point.step, heldout_loss=point.heldout, seen_loss=point.seen)
        adapter_at(run, point.step).mkdir(parents=True, exist_ok=True)
    for step, each in scored.items():
        run.log(step, **{metric_name(name): value for name, value in vars(each).items()})
    return points, scored


def finished_run(folder: Path, **status) -> WrittenRun:
    """A finished run with all files that Judge reads."""
    run = run_in(folder, "done", steps=100, phase="done", seconds_left=0.0, seconds=170.0, **status)
    for step in SAMPLE_STEPS:
        add_samples(run, step)
    judge(run)
    return run


def judge(run):
    """Write the measurements and the suggestion of a finished run."""
    points, scored = measure(run)
    found = suggest(points, 100, scored)
    told = {**vars(found), "curve": [vars(point) for point in found.curve]}
    told["scores"] = {step: vars(each) for step, each in found.scores.items()}
    (run.path / "suggestion.json").write_text(json.dumps({**told, "adapter": f"adapters/step-{found.step:07d}"}))
