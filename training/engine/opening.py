"""Open the run directory at the start of a recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from pipelines.errors import InputError
from pipelines.output_paths import check_output_folder
from pipelines.run_file import ResolvedOptions
from pipelines.text_files import write_text_atomically
from training.engine.resuming import check_can_resume
from training.options.output import LATEST, RunOptions
from training.runs.provenance import command_line, typed_words
from training.runs.record import newest_step
from training.runs.run import RunDirectory
from training.runs.tracking import start_tracker

logger = get_logger(__name__)
RUNS = "runs"


class RecipeOptions(Protocol):
    """The options of a recipe."""

    output: RunOptions
    data: object

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, by group."""


def check_outputs(options: RecipeOptions) -> None:
    """Check the folders that the recipe writes to.

    Raises: InputError naming the option of a folder that cannot be written to.
    """
    check_output_folder(options.output.output_dir or RUNS, "--output_dir")
    data = options.data
    for name in ("cache_dir", "class_data_dir"):
        is_read_only = name == "class_data_dir" and not getattr(data, "with_prior_preservation", False)
        if getattr(data, name, None) is not None and not is_read_only:
            check_output_folder(getattr(data, name), f"--{name}")


def open_run(options: RecipeOptions, title: str, accelerator: Accelerator) -> RunDirectory:
    """The given run directory, or a new one named by time and `title`; it is the same on all processes.

    Raises: InputError if it contains another run, or the options of a resumed run have changed.
    """
    output = options.output
    fresh = Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{title}"
    path = Path(broadcast_object_list([output.output_dir or str(fresh)])[0])
    output.output_dir = str(path)
    if output.resume_from_checkpoint == LATEST:
        check_can_resume(path, options.to_dict(), accelerator.num_processes)
    elif (path / ResolvedOptions.NAME).exists():
        raise InputError(f"{str(path)!r} contains a run. Give another --output_dir, or add --resume_from_checkpoint latest.")
    accelerator.wait_for_everyone()
    run = RunDirectory.create(path, options.to_dict(), accelerator.is_main_process)
    if run.writes:
        write_text_atomically(path / "command", command_line(typed_words(["accelerate", "launch"])) + "\n")
        run.update_status(processes=accelerator.num_processes)
    logger.info(f"Run directory: {path}.")
    run.trackers.extend(start_tracker(output.report_to, path, newest_step(run.checkpoints), run.writes))
    return run
