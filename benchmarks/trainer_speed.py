"""This trainer against diffusers' own SDXL LoRA DreamBooth script: steps a second at equal work, and where the time goes.

    python benchmarks/trainer_speed.py --diffusers_script train_dreambooth_lora_sdxl.py

Both train LoRA of one rank on the UNet's attention of one model, from the same pictures at the same resolution and batch size,
with AdamW in float32, in turns, each in a process of its own under the same stopwatch. The script is the user's copy, from
diffusers' `examples/dreambooth`, of the version that is installed.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import CLIPTextModel, CLIPTextModelWithProjection, HfArgumentParser

from pipelines.errors import InputError
from pipelines.subject.adapters import ATTENTION
from pipelines.subject.base_model import BUILT_IN_MODEL
from training.options.data import SAMPLE_PROMPT, SAMPLE_SUBJECT

STOPWATCH = "--under_stopwatch"
ROOT = Path(__file__).parents[1]
OURS = ROOT / "training" / "dreambooth_nora.py"
# Of the steps, those that are not counted: caches fill, and threads start.
WARM_UP = 5
NEVER = "1000000"


@dataclass
class BenchmarkOptions:
    """What both trainers do."""

    diffusers_script: str = field(metadata={"help": "Your copy of diffusers' train_dreambooth_lora_sdxl.py."})
    pretrained_model_name_or_path: str = field(default=str(BUILT_IN_MODEL), metadata={"help": "SDXL base model."})
    instance_data_dir: str = field(default=str(SAMPLE_SUBJECT), metadata={"help": "Folder of pictures."})
    resolution: int = field(default=64, metadata={"help": "Side of the pictures in pixels."})
    train_batch_size: int = field(default=4, metadata={"help": "Pictures a step."})
    rank: int = field(default=4, metadata={"help": "Rank of LoRA."})
    max_train_steps: int = field(default=60, metadata={"help": f"Steps of each run; the first {WARM_UP} are not counted."})
    repeats: int = field(default=3, metadata={"help": "Runs of each side, in turns."})
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


@dataclass
class Stopwatch:
    """When each optimisation step ended, and when each timed call began and ended; all in seconds."""

    steps: list[float] = field(default_factory=list)
    calls: list[tuple[str, float, float]] = field(default_factory=list)

    def time_calls(self, owner: object, name: str, phase: str) -> None:
        """Time every call of `owner.name` as `phase`."""
        original: Callable = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            began = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                self.calls.append((phase, began, time.perf_counter()))

        setattr(owner, name, timed)

    def start(self) -> None:
        """Time what a trainer spends its steps on."""
        self.time_calls(UNet2DConditionModel, "forward", "UNet forward")
        self.time_calls(AutoencoderKL, "encode", "autoencoder")
        self.time_calls(torch.Tensor, "backward", "backward")
        self.time_calls(torch.nn.utils, "clip_grad_norm_", "clipping")
        for encoder in (CLIPTextModel, CLIPTextModelWithProjection):
            self.time_calls(encoder, "forward", "text encoders")
        began: list[float] = []
        register_optimizer_step_pre_hook(lambda *_: began.append(time.perf_counter()))

        def end(*_: object) -> None:
            self.steps.append(time.perf_counter())
            self.calls.append(("optimiser", began.pop(), self.steps[-1]))

        register_optimizer_step_post_hook(end)

    def result(self, steps: int) -> dict[str, object]:
        """Steps a second over the last `steps` - `WARM_UP` steps, and milliseconds a step of each phase."""
        # Steps before the training's own, such as those of a dry run, are left out too.
        counted = self.steps[-(steps - WARM_UP) :]
        began, ended, count = counted[0], counted[-1], len(counted) - 1
        phases: dict[str, float] = defaultdict(float)
        for phase, first, last in self.calls:
            if began <= first and last <= ended:
                phases[phase] += 1000 * (last - first) / count
        phases["everything else"] = 1000 * (ended - began) / count - sum(phases.values())
        return {"steps_per_second": count / (ended - began), "milliseconds": dict(phases)}


def under_stopwatch(target: Path, steps: int, command: list[str]) -> None:
    """Run a trainer's program here, as if it were started by itself, and write what the stopwatch found to `target`."""
    watch = Stopwatch()
    watch.start()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    target.write_text(json.dumps(watch.result(steps)), encoding="utf-8")


def measured(command: list[str], steps: int, log: Path) -> dict:
    """Run `command` in a process of its own under the stopwatch; what it says goes to `log`.

    Raises: RuntimeError with the last lines of the log if it fails.
    """
    target = log.with_suffix(".json")
    # This very checkout, whatever is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    own = [sys.executable, str(Path(__file__).resolve()), STOPWATCH, str(target), str(steps), *command]
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(own, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code or not target.exists():
        raise RuntimeError(f"{command[0]} failed: " + " | ".join(log.read_text(encoding="utf-8").splitlines()[-3:]))
    return json.loads(target.read_text(encoding="utf-8"))


def commands(options: BenchmarkOptions, folder: Path) -> dict[str, list[str]]:
    """The command of each side."""
    alike = [
        *("--pretrained_model_name_or_path", options.pretrained_model_name_or_path, "--instance_prompt", SAMPLE_PROMPT),
        *("--instance_data_dir", options.instance_data_dir, "--resolution", str(options.resolution), "--seed", "0"),
        *("--train_batch_size", str(options.train_batch_size), "--rank", str(options.rank), "--learning_rate", "1e-4"),
        *("--max_train_steps", str(options.max_train_steps), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--checkpointing_steps", NEVER, "--mixed_precision", "no"),
    ]
    ours = ["--method", "lora", "--target_modules", *ATTENTION, "--heldout_image", "none", "--heldout_steps", NEVER]
    ours += ["--validation_steps", NEVER, "--validation_prompt", SAMPLE_PROMPT, "--no_certify", "--report_to", "none"]
    sides = {
        "diffusers": [options.diffusers_script, *alike, *shlex.split(options.script_flags)],
        "ours": [str(OURS), *alike, *ours, *shlex.split(options.own_flags)],
    }
    return {side: [*command, "--output_dir", str(folder / side)] for side, command in sides.items()}


def table(results: dict[str, list[dict]]) -> str:
    """Steps a second, milliseconds a step by phase, and the ratio, as Markdown."""
    phases = dict.fromkeys(phase for runs in results.values() for run in runs for phase in run["milliseconds"])
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    rates = {side: [run["steps_per_second"] for run in runs] for side, runs in results.items()}
    shown = " | ".join(f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in rates.values())
    lines.append(f"| steps a second, median | {shown} |")
    for phase in phases:
        means = (fmean(run["milliseconds"].get(phase, 0) for run in runs) for runs in results.values())
        lines.append(f"| {phase}, ms a step | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
    ratio = median(rates["ours"]) / median(rates["diffusers"])
    return "\n".join([*lines, "", f"Ours does {ratio:.2f} times the steps of diffusers' script a second."])


def main(options: BenchmarkOptions) -> None:
    """Measure both sides in turns and print the table."""
    results: dict[str, list[dict]] = {"diffusers": [], "ours": []}
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for side, command in commands(options, Path(folder)).items():
                results[side].append(measured(command, options.max_train_steps, Path(folder) / f"{side}-{repeat}.log"))
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [STOPWATCH]:
        under_stopwatch(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main(HfArgumentParser(BenchmarkOptions, description=__doc__).parse_args_into_dataclasses()[0])
