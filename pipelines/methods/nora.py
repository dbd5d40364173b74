"""NoRA:  h = W x + alpha / inner_r B B' A' A x, the outer factors from activation-weighted SVD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from tqdm.auto import tqdm

from nora_vision import ActivationStatistics, NoraConfig, calibrate, initialize_nora_weights
from nora_vision.loading import load_adapter
from nora_vision.saving import save_adapter
from pipelines.methods import AdapterOptions

FULL, COMPACT = "full", "compact"


class Nora:
    """NoRA, started from the activations of the base model on the subject."""

    default_rank = 32
    default_learning_rate = 3e-4
    b_like = "nora_inner_B"

    def config(self, options: AdapterOptions, target_modules: list[str], exclude_modules: str | None) -> PeftConfig:
        """The configuration; the scaling is 1 unless alpha is given. The outer factors wait for `start`."""
        return NoraConfig(
            r=options.rank,
            inner_r=options.inner_r,
            alpha=options.inner_r if options.alpha is None else options.alpha,
            dropout=options.dropout,
            inner_init=options.inner_init,
            preserve_output=options.preserve_output,
            outer_init="awsvd",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def start(
        self, model: nn.Module, run_model: Callable[[], None], adapter_name: str, cache: Path, generator: torch.Generator
    ) -> None:
        """Outer factors from the base model's activations (kept in `cache`), inner factors from `generator`."""
        if cache.exists():
            statistics = ActivationStatistics.load(cache)
        else:
            statistics = calibrate(model, run_model)
            statistics.save(cache)
        with tqdm(desc="starting NoRA layers", leave=False) as bar:

            def progress(done: int, total: int) -> None:
                """Show how many layers are started."""
                bar.total = total
                bar.update(done - bar.n)

            initialize_nora_weights(model, statistics, adapter_name, generator=generator, progress=progress)

    def save(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write `full` (loads anywhere PEFT does) and `compact` (needs the very same base weights)."""
        for layout in (FULL, COMPACT):
            for name, model in components.items():
                save_adapter(model, folder / layout / name, adapter_name, compact=layout == COMPACT)

    def load(self, components: dict[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Add the adapter in each subfolder, full or compact, to the component of that name."""
        for name, model in components.items():
            load_adapter(model, folder / name, adapter_name)


METHOD = Nora()
