"""Compare this trainer with diffusers' SDXL LoRA DreamBooth script: steps per second at equal work, and time by phase.

    python benchmarks/trainer_speed.py --diffusers_script train_dreambooth_lora_sdxl.py

Both train LoRA of the same rank on the UNet's attention of the same model, with the same images, resolution and batch size, and
AdamW in float32. Each runs in a separate process with the same stopwatch. They take turns after every step, so that other
load slows both alike. The script is your copy from diffusers' `examples/dreambooth`, of the installed version.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, median

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import CLIPTextModel, CLIPTextModelWithProjection, HfArgumentParser

from pipelines.built_in import BUILT_IN_MODEL
from pipelines.errors import InputError
from pipelines.subject.target_layers import ATTENTION
from training.engine.dry_run import STEPS as DRY_RUN_STEPS
from training.options.data import SAMPLE_PROMPT, SAMPLE_SUBJECT

STOPWATCH = "--under_stopwatch"
ROOT = Path(__file__).parents[1]
OURS = ROOT / "training" / "dreambooth_nora.py"
# Number of steps that are not counted, while caches fill and threads start.
WARM_UP = 5
NEVER = "1000000"


@dataclass
class BenchmarkOptions:
    """The options of the benchmark."""

    diffusers_script: str = field(metadata={"help": "Your copy of diffusers' train_dreambooth_lora_sdxl.py."})
    pretrained_model_name_or_path: str = field(default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model."})
    instance_data_dir: str = field(default=str(SAMPLE_SUBJECT), metadata={"help": "Folder of images."})
    resolution: int = field(default=64, metadata={"help": "Side of the images in pixels."})
    train_batch_size: int = field(default=4, metadata={"help": "Images per step."})
    rank: int = field(default=4, metadata={"help": "Rank of LoRA."})
    max_train_steps: int = field(default=60, metadata={"help": f"Steps of each run; the first {WARM_UP} are not counted."})
    repeats: int = field(default=3, metadata={"help": "Runs of each trainer."})
    script_flags: str = field(default="", metadata={"help": "Further flags for diffusers' script, in one string."})
    own_flags: str = field(default="", metadata={"help": "Further flags for this trainer, in one string."})

    def __post_init__(self) -> None:
        if not Path(self.diffusers_script).is_file():
            raise InputError(
                f"There is no file {self.diffusers_script!r}. Get train_dreambooth_lora_sdxl.py from examples/dreambooth of "
                "diffusers' repository, of the version that is installed."
            )
        if self.max_train_steps <= WARM_UP + 1:
            raise InputError(f"max_train_steps must be above {WARM_UP + 1}, got {self.max_train_steps}.")


@dataclass(frozen=True)
class AlternatingRuns:
    """Alternation with another process, over two pipes.

    Args:
        reads, writes: file descriptors of this process's ends of the pipes.
        begins: whether this process has the first turn.
    """

    reads: int
    writes: int
    begins: bool

    def give(self) -> None:
        """Give the turn to the other process, unless it has ended."""
        with suppress(BrokenPipeError):
            os.write(self.writes, b".")

    def wait(self) -> None:
        """Wait for the turn, or for the end of the other process."""
        os.read(self.reads, 1)


@dataclass
class Stopwatch:
    """Start and end of each optimisation step and of each timed call, in seconds.

    Args:
        before: number of optimisation steps before the training, such as those of a dry run.
        alternating: used after every training step; None for a trainer that runs alone.
    """

    before: int = 0
    alternating: AlternatingRuns | None = None
    steps: list[tuple[float, float]] = field(default_factory=list)
    calls: list[tuple[str, float, float]] = field(default_factory=list)
    ended: int = 0
    began: float = 0.0

    def time_calls(self, owner: object, name: str, phase: str) -> None:
        """Time every call of `owner.name` as `phase`."""
        original: Callable = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            """The result of the call."""
            began = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                self.calls.append((phase, began, time.perf_counter()))

        setattr(owner, name, timed)

    def start(self) -> None:
        """Install the timers."""
        self.time_calls(UNet2DConditionModel, "forward", "UNet forward")
        self.time_calls(AutoencoderKL, "encode", "autoencoder")
        self.time_calls(torch.Tensor, "backward", "backward")
        self.time_calls(torch.nn.utils, "clip_grad_norm_", "clipping")
        for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
            self.time_calls(encoder, "forward", "text encoders")
        began: list[float] = []
        register_optimizer_step_pre_hook(lambda *_: began.append(time.perf_counter()))

        def end(*_: object) -> None:
            """Record the end of an optimisation step."""
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.calls.append(("optimiser", began.pop(), now))
            self.end_step(now)

        register_optimizer_step_post_hook(end)

    def end_step(self, now: float) -> None:
        """Record that a step has ended at `now`, and give the turn to the other process."""
        self.ended += 1
        if self.ended > self.before + 1:
            self.steps.append((self.began, now))
        if self.ended > self.before and self.alternating is not None:
            if self.ended > self.before + 1 or not self.alternating.begins:
                self.alternating.give()
            self.alternating.wait()
        self.began = time.perf_counter()

    def result(self) -> dict[str, object]:
        """Medians of steps per second, and of milliseconds per step by phase, without the first `WARM_UP` training steps.

        The mean would depend on single slow steps, for example while the disk is busy.
        """
        counted = [self._milliseconds(began, ended) for began, ended in self.steps[WARM_UP - 1 :]]
        phases = dict.fromkeys(phase for step in counted for phase in step)
        milliseconds = {phase: median(step.get(phase, 0.0) for step in counted) for phase in phases}
        return {"steps_per_second": 1000 / median(sum(step.values()) for step in counted), "milliseconds": milliseconds}

    def _milliseconds(self, began: float, ended: float) -> dict[str, float]:
        """Milliseconds by phase of the step from `began` to `ended`."""
        phases: dict[str, float] = defaultdict(float)
        for phase, first, last in self.calls:
            if began <= first and last <= ended:
                phases[phase] += 1000 * (last - first)
        phases["everything else"] = 1000 * (ended - began) - sum(phases.values())
        return phases


def under_stopwatch(settings: dict, command: list[str]) -> None:
    """Run a trainer's script in this process with the stopwatch and write the result, as configured by `Side.start`."""
    watch = Stopwatch(settings["before"], AlternatingRuns(**settings["alternating"]))
    watch.start()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    Path(settings["target"]).write_text(json.dumps(watch.result()), encoding="utf-8")


@dataclass(frozen=True)
class Side:
    """One of the two trainers.

    Args:
        command: script and flags.
        before: number of optimisation steps before the training.
    """

    command: list[str]
    before: int = 0

    def start(self, log: Path, alternating: AlternatingRuns) -> subprocess.Popen:
        """Start the trainer with the stopwatch in a new process, with its output in `log`."""
        # Use this checkout even if the package is installed.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        settings = json.dumps(
            {"target": str(log.with_suffix(".json")), "before": self.before, "alternating": asdict(alternating)}
        )
        stopwatch_command = [sys.executable, str(Path(__file__).resolve()), STOPWATCH, settings, *self.command]
        ends = (alternating.reads, alternating.writes)
        with log.open("w", encoding="utf-8") as out:
            return subprocess.Popen(stopwatch_command, stdout=out, stderr=subprocess.STDOUT, env=environment, pass_fds=ends)


def measured(trainers: dict[str, Side], folder: Path) -> dict[str, dict]:
    """The results of two trainers that take turns, by name.

    Raises: RuntimeError with the last lines of the log if one fails.
    """
    (first_reads, second_writes), (second_reads, first_writes) = os.pipe(), os.pipe()
    both = (AlternatingRuns(first_reads, first_writes, True), AlternatingRuns(second_reads, second_writes, False))
    started = {
        name: side.start(folder / f"{name}.log", alternating)
        for (name, side), alternating in zip(trainers.items(), both, strict=True)
    }
    for end in (first_reads, first_writes, second_reads, second_writes):
        os.close(end)
    codes = {name: process.wait() for name, process in started.items()}
    for name, code in codes.items():
        if code:
            said = (folder / f"{name}.log").read_text(encoding="utf-8").splitlines()[-3:]
            raise RuntimeError(f"{trainers[name].command[0]} failed: " + " | ".join(said))
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in trainers}


def sides(options: BenchmarkOptions, folder: Path) -> dict[str, Side]:
    """Both trainers, each with a separate output folder below `folder`."""
    common = [
        *("--pretrained_model_name_or_path", options.pretrained_model_name_or_path, "--instance_prompt", SAMPLE_PROMPT),
        *("--instance_data_dir", options.instance_data_dir, "--resolution", str(options.resolution), "--seed", "0"),
        *("--train_batch_size", str(options.train_batch_size), "--rank", str(options.rank), "--learning_rate", "1e-4"),
        *("--max_train_steps", str(options.max_train_steps), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--checkpointing_steps", NEVER, "--mixed_precision", "no", "--report_to", "tensorboard"),
    ]
    # With --repeats a multiple of the batch size, all batches of diffusers' script are full.
    theirs = ["--repeats", str(options.train_batch_size), "--output_dir", str(folder / "theirs")]
    ours = ["--method", "lora", "--target_modules", *ATTENTION, "--heldout_image", "none", "--heldout_steps", NEVER]
    ours += ["--validation_steps", NEVER, "--validation_prompt", SAMPLE_PROMPT, "--no_certify"]
    ours += ["--output_dir", str(folder / "ours")]
    return {
        "diffusers": Side([options.diffusers_script, *common, *theirs, *shlex.split(options.script_flags)]),
        "ours": Side([str(OURS), *common, *ours, *shlex.split(options.own_flags)], DRY_RUN_STEPS),
    }


def table(results: list[dict[str, dict]]) -> str:
    """Steps per second, milliseconds per step by phase, and the ratio, as Markdown, from results of `measured`."""
    runs = {name: [result[name] for result in results] for name in results[0]}
    rates = {name: [run["steps_per_second"] for run in measured_runs] for name, measured_runs in runs.items()}
    phases = dict.fromkeys(chain.from_iterable(run["milliseconds"] for run in chain(*runs.values())))
    lines = [_row(" ", runs), "|---|" + "---|" * len(runs), _row(" steps per second, median ", map(_spread, rates.values()))]
    lines += [
        _row(f" {phase}, ms per step ", (_milliseconds(measured_runs, phase) for measured_runs in runs.values()))
        for phase in phases
    ]
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["diffusers"], strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return "\n".join([*lines, "", f"Ours does {median(ratios):.2f} times the steps per second of diffusers' script ({each})."])


def _row(head: str, cells: Iterable[str]) -> str:
    return f"|{head}| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _milliseconds(runs: list[dict], phase: str) -> str:
    """The mean time of a phase over `runs`."""
    return f"{fmean(run['milliseconds'].get(phase, 0) for run in runs):.1f}"


def main(options: BenchmarkOptions) -> None:
    """Measure both trainers `repeats` times and print the table."""
    results = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measured(sides(options, Path(folder)), Path(folder)))
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [STOPWATCH]:
        under_stopwatch(json.loads(sys.argv[2]), sys.argv[3:])
    else:
        main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
