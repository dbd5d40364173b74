"""Held-out evaluation: the denoising loss of images that were not trained on, with everything fixed but the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipelines.errors import InputError
from pipelines.randomness import Draw, keyed_generator
from pipelines.subject.base_model import PromptEmbeddings, encode_tokens
from pipelines.subject.encoding import CachedLatents
from pipelines.subject.loss import DenoisingLoss

AUTO, NONE, LEAVE_ONE_OUT = "auto", "none", "leave_one_out"
# The share of height and width about the middle of an image where the subject is expected.
MIDDLE = 0.5
# From so many images on, one is spared.
ENOUGH_TO_SPARE_ONE = 5


@dataclass(frozen=True)
class HeldOut:
    """What is held out.

    Args:
        index: of the image that is left out of training; None where all are trained on.
        folds: indices of the images left out, one at a time, by the short cross-validation trainings before the real one.
    """

    index: int | None = None
    folds: tuple[int, ...] = ()


def choose_heldout(names: Sequence[str], asked: str, seed: int) -> HeldOut:
    """What to hold out of the images called `names`.

    Args:
        asked: one of the names; "none"; "leave_one_out"; or "auto": one image, drawn by `seed`, where there are at least
            `ENOUGH_TO_SPARE_ONE`, leave-one-out where there are at least two, and none of a single one.
    Raises: InputError if there is no such image, or none would be left to train on.
    """
    if asked == AUTO:
        asked = LEAVE_ONE_OUT if len(names) > 1 else NONE
        if len(names) >= ENOUGH_TO_SPARE_ONE:
            return HeldOut(index=int(torch.randint(len(names), (), generator=keyed_generator(seed, Draw.HELD_OUT))))
    if asked == NONE:
        return HeldOut()
    if asked != LEAVE_ONE_OUT and asked not in names:
        raise InputError(f"heldout_image must be {AUTO}, {NONE}, {LEAVE_ONE_OUT} or one of {', '.join(names)}, got {asked!r}.")
    if len(names) < 2:
        raise InputError("The folder holds one image, and it is held out. Add images to train on, or give 'none'.")
    return HeldOut(folds=tuple(range(len(names)))) if asked == LEAVE_ONE_OUT else HeldOut(index=names.index(asked))


def middle_of(values: torch.Tensor) -> torch.Tensor:
    """The middle of (..., height, width), `MIDDLE` of either."""
    height, width = values.shape[-2:]
    rows, columns = (slice(round(side * (1 - MIDDLE) / 2), round(side * (1 + MIDDLE) / 2)) for side in (height, width))
    return values[..., rows, columns]


@torch.no_grad()
def mean_denoising_loss(
    loss: DenoisingLoss,
    images: CachedLatents,
    draws: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    limit: int | None = None,
) -> float:
    """The mean of the unweighted loss of each image over `draws` timesteps, evenly spread, each with its own fixed noise.

    Only the middle of an image counts, where the subject is: what is behind it in an image that was held out can be known
    by no adapter, and takes the more of the loss the better the places of the others are learned.
    Prompts are encoded by the text encoders as they are now. Models are compared on the same noise and timesteps as long
    as images, `draws` and `seed` are the same. With `limit`, only the first so many images count.
    """
    timesteps = ((torch.arange(draws) + 0.5) * loss.num_timesteps / draws).long()
    device, was_training = loss.unet.device, loss.training
    loss.eval()
    prompts = encode_tokens(loss.text_encoders, images.tokens.transpose(0, 1).to(device))
    total, measured = 0.0, range(len(images))[:limit]
    for index in measured:
        latents, prompt = images.mean(index), int(images.prompt_of[index])
        noise = torch.randn((draws, *latents.shape), generator=keyed_generator(seed))
        for part in torch.arange(draws).split(batch_size):
            count = len(part)
            repeated = PromptEmbeddings(
                *(values[prompt].expand(count, *values.shape[1:]) for values in (prompts.hidden, prompts.pooled))
            )
            pixels = (latents.expand(noise[part].shape).to(device), noise[part].to(device))
            levels = timesteps[part].to(device)
            answer = loss.predict(*pixels, levels, images.time_ids(index).expand(count, 6).to(device), repeated)
            total += loss.noising.errors(*(middle_of(values) for values in (answer, *pixels)), levels).sum().item()
    loss.train(was_training)
    return total / (draws * len(measured))
