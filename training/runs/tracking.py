"""Trackers of accelerate that also get the metrics and images of a run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from pipelines.errors import InputError

TENSORBOARD, WANDB, NONE = "tensorboard", "wandb", "none"
PROJECT = "nora-vision"


def start_tracker(name: str, run: Path, first_step: int, writes: bool = True) -> list[GeneralTracker]:
    """Start the tracker called `name`; empty for "none" or if `writes` is false.

    Args:
        run: the run's directory. TensorBoard writes to its folder `tensorboard`; the wandb run gets its name.
        first_step: the number of steps already trained; TensorBoard hides values of later steps.
    Raises: InputError if the tracker's package is not installed.
    """
    if name == NONE or not writes:
        return []
    if find_spec(name) is None:
        raise InputError(f"--report_to {name} needs the package {name!r}. Install it with `pip install {name}`, or give 'none'.")
    if name == TENSORBOARD:
        tracker = TensorBoardTracker("", logging_dir=run / TENSORBOARD, purge_step=first_step + 1)
    else:
        tracker = WandBTracker(PROJECT, name=run.name, id=run.name, dir=str(run), resume="allow")
    tracker.start()
    return [tracker]


def log_image(tracker: GeneralTracker, name: str, image: Image.Image, step: int) -> None:
    """Log an image to a tracker."""
    pixels = np.asarray(image.convert("RGB"))
    # By default, TensorBoard expects channels first and wandb expects them last.
    layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
    tracker.log_images({name: pixels[None]}, step=step, **layout)
