"""CLIP-SVD: h = W x + U diag(d) V^T x,  U and V from the SVD of W are frozen, the changes d of its singular values are trained
[Koleilat et al. 2025]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_checks import matrix_size, targeted_layers
from pipelines.adapter_method import TaskDefaults, option
from pipelines.lazy_modules import nn, torch
from pipelines.methods.lora_xs import LoraXs
from pipelines.option_checks import at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class ClipSvdOptions:
    """Options of CLIP-SVD."""

    num_singular_values: int | None = option(
        None,
        "number of the largest singular values of each weight that are trained; 0 for all, which plain LoRA files of large "
        "models cannot hold exactly",
        "Singular values",
    )

    def __post_init__(self) -> None:
        at_least(self, 0, "num_singular_values")


class ClipSvd(LoraXs):
    """CLIP-SVD on attention layers; the paper also adapts the feed-forward ones.

    Its adapter is that of NoRA with a diagonal matrix between the singular vectors, so that it starts at the base model and is
    merged, saved and loaded in the same way. The trained values are the paper's: they differ from it by a constant.
    """

    name = "clip_svd"
    title = "CLIP-SVD"
    reference = "Koleilat et al. 2025, Singular Value Few-shot Adaptation of Vision-Language Models"
    parameters = "min(m, n, num_singular_values or m)"
    Options = ClipSvdOptions

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's learning rate and, for classification, all four projections of attention and all singular values.

        For subjects there are as many as plain LoRA files hold exactly.
        """
        if task == "subject":
            return TaskDefaults(5e-4, {"num_singular_values": 64})
        return TaskDefaults(5e-4, {"num_singular_values": 0}, ["q", "k", "v", "out"])

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """NoRA's configuration with a diagonal core; `attach` sets the rank of each layer."""
        from nora_vision import NoraConfig

        return NoraConfig(
            r=self.options.num_singular_values or 1,
            inner_r=1,
            alpha=1.0,
            inner_form="diagonal",
            outer_init="svd",
            outer_scaling="none",
            weighting="none",
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter, with as many directions in each layer as its weight has, or as `num_singular_values` allows."""
        sizes = {name: min(size) for name, layer in targeted_layers(model, config) if (size := matrix_size(layer)) is not None}
        most = self.options.num_singular_values or max(sizes.values(), default=1)
        config.r = min(most, max(sizes.values(), default=most))
        config.rank_pattern = {f"^{name}": size for name, size in sizes.items() if size < config.r}
        super().attach(model, config, adapter_name, generator)


METHOD = ClipSvd
