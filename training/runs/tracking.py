"""Trackers: where a run's metrics and images go besides its own directory. They are accelerate's."""

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
    """The tracker called `name`, started, or nothing for "none" and where `writes` is false.

    Args:
        run: the run's directory. TensorBoard's files go to its `tensorboard` folder; wandb's run has its name.
        first_step: the steps already done; what TensorBoard has of later ones is hidden.
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
    """Hand one image to a tracker."""
    pixels = np.asarray(image.convert("RGB"))
    # TensorBoard takes channels first unless told; wandb takes them last.
    more = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
    tracker.log_images({name: pixels[None]}, step=step, **more)
