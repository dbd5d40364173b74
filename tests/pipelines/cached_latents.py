"""Cached latents for tests, held in memory."""

from __future__ import annotations

from functools import partial

import torch

from pipelines.subject.base_model import PromptEmbeddings
from pipelines.subject.encoding import CachedLatents


def _read(latents: torch.Tensor, time_ids: torch.Tensor, index: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
    return latents[index, variant], time_ids[index]


def cached_latents(
    latents: torch.Tensor, time_ids: torch.Tensor, tokens: torch.Tensor, prompts: PromptEmbeddings
) -> CachedLatents:
    """Images of one size, each with a separate prompt.

    Args:
        latents: (images, variants, 2, channels, height, width).
        time_ids: (images, 6), the same for all variants.
        tokens: (images, encoders, tokens) int64.
        prompts: the embeddings of `tokens`.
    """
    count, variants, _, _, height, width = latents.shape
    return CachedLatents(
        ((height, width),) * count, variants, partial(_read, latents, time_ids), torch.arange(count), tokens, prompts
    )
