"""Writes a run directory step by step as the recipes do, without training or loading a model library.

It waits at the step in the file `UNTIL` of the directory, so that no test depends on its speed.
"""

import signal
import sys
import time
from pathlib import Path

from run_folders import CURVE_STEPS, GIVEN, SAMPLE_STEPS, WrittenRun, add_checkpoint, add_samples, judge

from pipelines.run_file import ResolvedOptions
from training.runs.record import update_status
from training.runs.run_files import DryRunReport

TOTAL, FIRST_STOP, UNTIL, BEGAN = 100, 20, "until", "began"
# The report of a dry run.
DRY_RUN = DryRunReport(
    num_trainable_parameters=54272, seconds_per_step=0.3, seconds=120.0, peak_memory=1_120_000_000,
    checkpoint=800_000, disk=3_200_000, disk_free=58_200_000_000, memory_limit=None,
)  # fmt: skip


def main():
    """Continue the run of `--output_dir` from its last step."""
    run = WrittenRun(Path(sys.argv[sys.argv.index("--output_dir") + 1]))
    signal.signal(signal.SIGTERM, lambda *_: stop(run))
    ResolvedOptions(GIVEN).write(run.path)
    (run.path / BEGAN).write_text(" ".join(sys.argv[1:]))
    step = run.status().step or 0
    if not step:
        reach(run, 0)
    while step < TOTAL:
        update_status(run, state="running", phase="training", step=step, total=TOTAL, share=step / TOTAL, seconds_left=1.0)
        wait_beyond(run, step)
        step += 1
        run.log(step, loss=1.0, lr=1e-3)
        reach(run, step)
    if "--dry_run" in sys.argv:
        DRY_RUN.write(run.path)
    judge(run)
    update_status(run, state="done", phase="done", step=TOTAL, total=TOTAL, seconds=1.0, seconds_left=0.0)


def reach(run, step):
    """Write sample images and a checkpoint at some steps, as a recipe does."""
    if step in SAMPLE_STEPS:
        add_samples(run, step)
    if step in CURVE_STEPS and step:
        add_checkpoint(run, step)


def wait_beyond(run, step):
    """Wait until the run may go further than `step`."""
    until = run.path / UNTIL
    while step >= (int(until.read_text() or 0) if until.exists() else FIRST_STOP):
        time.sleep(0.05)


def stop(run):
    """Stop like a recipe that receives a signal."""
    update_status(run, state="stopped", error="Stopped: stopped by SIGTERM")
    sys.exit(143)


if __name__ == "__main__":
    main()
