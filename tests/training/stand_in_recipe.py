"""A stand-in for a recipe: it counts steps in a file of its run directory, resumes at the last one, and records its status.

python stand_in_recipe.py --steps 3 --output_dir RUN [--fail | --die] [--hold FILE] [--resume_from_checkpoint latest]
"""

import argparse
import os
import signal
import time
from pathlib import Path

from pipelines.run_file import ResolvedOptions
from training.runs.record import RunRecord, update_status

COUNTED = "steps.txt"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--die", action="store_true")
    parser.add_argument("--hold", type=Path, help="a file that must exist before the second step")
    parser.add_argument("--resume_from_checkpoint")
    options = parser.parse_args()
    counted = options.output_dir / COUNTED
    record = RunRecord(options.output_dir)
    if (options.output_dir / ResolvedOptions.NAME).exists() and options.resume_from_checkpoint != "latest":
        raise SystemExit("error: the folder contains a run")
    ResolvedOptions({}).write(options.output_dir)
    update_status(record, state="running")
    if options.fail:
        raise SystemExit("error: rank must be at least 1")
    while (done := len(counted.read_text().split()) if counted.exists() else 0) < options.steps:
        time.sleep(0.2)
        with counted.open("a") as lines:
            lines.write(f"{done + 1}\n")
        if options.die and done == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while options.hold is not None and not options.hold.exists():
            time.sleep(0.05)
    update_status(record, state="done")


if __name__ == "__main__":
    main()
