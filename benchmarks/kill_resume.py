"""Kill a training run with SIGKILL many times, resume it each time, and compare its files with those of an uninterrupted run.

    python benchmarks/kill_resume.py --kills 50 --seed 0

A third of the kills come while a checkpoint is being written, the others at a random time, including start and export. Runs
are forked from a process that has imported everything, which saves minutes per kill without changing its effect. The model is
small and random, since the test is about the mechanisms of the trainer. The exit code is 1 if any file of a finished run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.subject.generate import Sampling
from training import dreambooth_nora
from training.engine.checkpoints import WRITING
from training.options import parse_options
from training.runs.record import newest_step
from training.runs.run import RunDirectory

ROOT = Path(__file__).parents[1]
STEPS = 16
FLAGS = shlex.split(f"""
--instance_prompt sks --heldout_image 3.png --random_flip --rank 4 --inner_r 2 --target_modules to_v --dropout 0.1
--train_text_encoder --max_train_steps {STEPS} --train_batch_size 2 --gradient_accumulation_steps 2 --lr_warmup_steps 3 --use_ema
--checkpointing_steps 1 --checkpoints_total_limit 2 --validation_prompt sks --validation_steps 8 --heldout_steps 8
--with_prior_preservation --class_prompt thing --num_class_images 2 --center_crop false --crops_per_image 2
--report_to none --certify false
""")
RESUME = ["--resume_from_checkpoint", "latest"]
COMPARED = ("adapter", "adapters", "diffusers", "suggested")
PATIENCE = 600.0


def prepare(folder: Path) -> list[str]:
    """A random model and four images under `folder`; returns the flags of the run on them."""
    sys.path.insert(0, str(ROOT / "tests" / "nora_vision"))
    from tiny_pipeline import tiny_pipeline

    tiny_pipeline().save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (90, 70 + 10 * index, 3), dtype=np.uint8)).save(folder / "pictures" / f"{index}.png")
    return [
        *("--pretrained_model_name_or_path", str(folder / "model"), "--instance_data_dir", str(folder / "pictures")),
        *FLAGS,
    ]


def start(flags: Sequence[str], log: Path) -> int:
    """Fork a process in a new process group that runs the trainer; returns its id."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        # More inference steps do not help random weights.
        dreambooth_nora.Sampling = partial(Sampling, num_inference_steps=2)
        dreambooth_nora.main(parse_options(flags))
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Tally:
    """The results so far.

    Args:
        phases: number of kills by phase of the run.
        writing: number of kills while a checkpoint was being written.
        finished: number of runs that finished after kills.
        different: files that differed.
    """

    phases: dict[str, int] = field(default_factory=dict)
    writing: int = 0
    finished: int = 0
    different: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """The number of kills."""
        return sum(self.phases.values())

    def count(self, run: RunDirectory) -> None:
        """Count a kill by the state that it left behind."""
        phase = run.status().phase or "starting"
        self.phases[phase] = self.phases.get(phase, 0) + 1
        self.writing += any(run.checkpoints.glob(f"{WRITING}*"))


def ended(child: int) -> int | None:
    """The exit code of `child`; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def killed(child: int, run: RunDirectory, after: float, in_write: bool) -> bool:
    """Kill `child` after `after` seconds and, if `in_write`, while a checkpoint is being written; False if it ended before.

    Raises: RuntimeError if it fails by itself, or hangs.
    """
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        code = ended(child)
        if code is not None:
            if code:
                raise RuntimeError(f"The run failed by itself with exit code {code}; see the log beside {str(run.path)!r}.")
            return False
        if time.monotonic() - began >= after and (not in_write or any(run.checkpoints.glob(f"{WRITING}*"))):
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0005 if in_write else 0.005)
    raise RuntimeError(f"The run in {str(run.path)!r} has neither ended nor written a checkpoint in {PATIENCE:.0f} s.")


def differences(expected: Path, actual: Path) -> list[str]:
    """The files of two runs whose bytes differ, and "metrics.jsonl" if any logged value differs."""
    files = {
        file.relative_to(folder)
        for folder in (expected, actual)
        for part in COMPARED
        for file in (folder / part).rglob("*.safetensors")
    }
    unequal = [str(file) for file in sorted(files) if _bytes_of(expected / file) != _bytes_of(actual / file)]
    return unequal + (["metrics.jsonl"] if _curves(expected) != _curves(actual) else [])


def _bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def _curves(run: Path) -> list[tuple[int, dict[str, float]]]:
    """The logged metrics of a run by step, without the times."""
    return [(logged.step, logged.values) for logged in RunDirectory(run).metrics()]


def kill_repeatedly(flags: list[str], folder: Path, seconds: float, kills: int, rng: random.Random) -> Tally:
    """Start and kill runs with `flags` until there are `kills` kills and the last run has finished."""
    tally = Tally()
    while tally.kills < kills:
        run = RunDirectory(folder / f"run-{tally.finished}", writes=False)
        alive = True
        while alive:
            began, done = time.monotonic(), newest_step(run.checkpoints)
            child = start([*flags, "--output_dir", str(run.path), *RESUME], run.path.with_suffix(".log"))
            if tally.kills == kills:
                alive = killed(child, run, PATIENCE, False)
                break
            in_write = rng.random() < 1 / 3
            # Less time remains for a run that has made progress.
            left = seconds * (1 - 0.5 * done / STEPS)
            alive = killed(child, run, rng.uniform(0, left * (0.4 if in_write else 1.05)), in_write)
            if alive:
                tally.count(run)
            elif done == 0:
                # The run may be faster than before, and kills must not come after its end.
                seconds = min(seconds, time.monotonic() - began)
        tally.finished += 1
        tally.different += differences(folder / "whole", run.path)
        print(f"{tally.kills} kills, {tally.finished} runs finished, {len(tally.different)} files differ", flush=True)  # noqa: T201
        shutil.rmtree(run.path)
    return tally


def main() -> None:
    """Run the uninterrupted run, then the killed runs, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--flags", default="", help="further flags of the trainer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [*prepare(folder), *options.flags.split()]
        began = time.monotonic()
        if killed(
            start([*flags, "--output_dir", str(folder / "whole")], folder / "whole.log"), RunDirectory(folder), PATIENCE, False
        ):
            raise RuntimeError("The uninterrupted run did not end.")
        seconds = time.monotonic() - began
        tally = kill_repeatedly(flags, folder, seconds, options.kills, random.Random(options.seed))
    result = {
        "kills": tally.kills,
        "while writing a checkpoint": tally.writing,
        "by phase": tally.phases,
        "runs finished": tally.finished,
        "seconds of the uninterrupted run": round(seconds, 1),
        "files that differ": tally.different,
    }
    print(json.dumps(result, indent=2))  # noqa: T201
    raise SystemExit(1 if tally.different else 0)


if __name__ == "__main__":
    main()
