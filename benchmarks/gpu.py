"""What only a GPU can show, as one table that is complete up to the last measurement whenever this is interrupted.

    python benchmarks/gpu.py --minutes 8 --output gpu.md

The steps are those of `gpu_steps.py`, in order of value. Each is a process of its own: one that fails is a row with the reason,
and one that exceeds its share of the time that is left is stopped. `gpu.sh` starts this where packages are missing and nothing
can be downloaded. No model is downloaded: all have random weights.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Shares of the time by step; time that a step leaves goes to those after it.
SHARES = {
    "bf16": 16,
    "fp16": 10,
    "nf4": 12,
    "compiled": 16,
    "diffusers": 14,
    "start": 10,
    "sampling": 8,
    "clip": 6,
    "pretraining": 8,
}
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "bitsandbytes")
HEAD = "| step | what | seconds | peak memory, GB | note |\n|---|---|---|---|---|\n"
MOST_CHARACTERS = 240
STEPS_PROGRAM = Path(__file__).with_name("gpu_steps.py")
GB = 1e9
EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")


def row(step: str, what: str, seconds: float | None = None, memory: int | None = None, note: str = "") -> str:
    """A row of the table; `memory` in bytes."""
    time_taken = "" if seconds is None else f"{seconds:.4f}"
    peak = "" if memory is None else f"{memory / GB:.2f}"
    shortened = " ".join(note.replace("|", "/").split())[:MOST_CHARACTERS]
    return f"| {step} | {what} | {time_taken} | {peak} | {shortened} |"


def rows_of(step: str, arguments: Sequence[str], seconds: float) -> Iterator[str]:
    """The rows that a step prints in its own process, then one with the reason if it fails or exceeds `seconds`."""
    command = [sys.executable, str(STEPS_PROGRAM), *arguments, "--steps", step]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        ends = time.monotonic() + seconds
        # With all processes that it has started.
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            # Libraries may print lines of their own.
            yield from (line.rstrip("\n") for line in process.stdout if line.startswith(f"| {step} |"))
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        log = errors.read()
    if code == -signal.SIGKILL and time.monotonic() >= ends:
        yield row(step, "stopped", note=f"its {seconds:.0f} s were over")
    elif code:
        yield row(step, "failed", note=reason_in(log) or f"exit code {code}")


def reason_in(log: str) -> str:
    """The last line of `log` that names an exception, or else the last one."""
    lines = log.strip().splitlines()
    return next((line for line in reversed(lines) if EXCEPTION.match(line)), lines[-1] if lines else "")


def versions() -> Iterator[str]:
    """Name and version of each package that the measurements use."""
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} missing"


def machine() -> str:
    """The GPU with its driver, and the versions of the packages, as sentences."""
    card = f"{platform.processor() or platform.machine()}, no GPU"
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().replace("\n", "; ") or card
    return f"{card}. Python {platform.python_version()}, {', '.join(versions())}."


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command-line options, which the steps take as well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="when to end, at the latest")
    parser.add_argument("--output", default="gpu.md", help="Markdown file for the table, written after every row")
    parser.add_argument("--steps", nargs="+", choices=list(SHARES), default=list(SHARES), help="which to run, in this order")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each training that a median is taken of")
    parser.add_argument("--diffusers_script", help="diffusers' train_dreambooth_lora_sdxl.py, for the step diffusers")
    parser.add_argument("--images_dir", help="photographs of mini-CLIP's pretraining. Default: rendered scenes")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test this program without a GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps and write the table."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parsed(given)
    ends = time.monotonic() + 60 * options.minutes
    text = f"{machine()}\n\n`python benchmarks/gpu.py {shlex.join(given)}`:\n\n{HEAD}"
    sys.stdout.write(text)
    for index, step in enumerate(options.steps):
        share = SHARES[step] / sum(SHARES[later] for later in options.steps[index:])
        for line in rows_of(step, given, share * (ends - time.monotonic())):
            text += f"{line}\n"
            Path(options.output).write_text(text, encoding="utf-8")
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
