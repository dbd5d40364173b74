"""The images that are held out of training to measure the validation loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import InputError
from pipelines.lazy_modules import torch
from pipelines.randomness import RandomStream, keyed_generator

AUTO, NONE, LEAVE_ONE_OUT = "auto", "none", "leave_one_out"
# With at least this many images, one is held out; with fewer, each in turn.
MIN_IMAGES_TO_HOLD_OUT = 5


@dataclass(frozen=True)
class HeldOut:
    """The images that are held out of training.

    Args:
        index: the image held out of training; None to train on all of them.
        folds: the images held out in turn by cross-validation, in short trainings before the real one.
    """

    index: int | None = None
    folds: tuple[int, ...] = ()


def choose_heldout(names: Sequence[str], heldout_image: str, seed: int) -> HeldOut:
    """Choose which of the images called `names` to hold out.

    Args:
        heldout_image: one of the names; "none"; "leave_one_out"; or "auto": one image, sampled by `seed`, if there are at least
            `MIN_IMAGES_TO_HOLD_OUT`; otherwise leave-one-out, and nothing if there is a single image.
    Raises: InputError if there is no such image, or none would be left to train on.
    """
    if heldout_image == AUTO:
        heldout_image = LEAVE_ONE_OUT if len(names) > 1 else NONE
        if len(names) >= MIN_IMAGES_TO_HOLD_OUT:
            return HeldOut(index=int(torch.randint(len(names), (), generator=keyed_generator(seed, RandomStream.HELD_OUT))))
    if heldout_image == NONE:
        return HeldOut()
    if heldout_image != LEAVE_ONE_OUT and heldout_image not in names:
        raise InputError(
            f"heldout_image must be {AUTO}, {NONE}, {LEAVE_ONE_OUT} or one of {', '.join(names)}, got {heldout_image!r}."
        )
    if len(names) < 2:
        raise InputError(
            "heldout_image needs at least 2 images, got 1: none would be left to train on. Add images, or give 'none'."
        )
    return (
        HeldOut(folds=tuple(range(len(names)))) if heldout_image == LEAVE_ONE_OUT else HeldOut(index=names.index(heldout_image))
    )


def num_folds(count: int, heldout_image: str) -> int:
    """The number of folds of cross-validation on `count` images; 0 without it."""
    crosses = heldout_image == LEAVE_ONE_OUT or (heldout_image == AUTO and count < MIN_IMAGES_TO_HOLD_OUT)
    return count if crosses and count > 1 else 0
