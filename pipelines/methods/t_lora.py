"""T-LoRA: h = W x + s B M_t A x,  M_t keeps the first r(t) of r rows, fewer the more noise there is  [Soboleva et al. 2025].

    r(t) = floor((r - r_min) (T - t) / T) + r_min

At the noisiest steps, which decide the layout of an image, only r_min directions can overfit to a single training image. A starts
with orthonormal rows, so that the directions which M_t removes are not a copy of those that it keeps; B starts at zero. (The
paper's Ortho-LoRA starts B orthonormal too, and subtracts the start.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.adapter_method import LowRankOptions, Probe, TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.methods.lora import Lora, lora_config
from pipelines.native_files import FULL, METHOD_KEY, NativeFiles, read_native, write_native
from pipelines.option_checks import at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors

# T, the number of noise levels of SDXL.
TIMESTEPS = 1000
# Metadata key: r_min.
MIN_RANK = "t_lora_min_rank"
EXPORT_NOTE = (
    "The rank of T-LoRA depends on the noise level, which a file of plain LoRA cannot express. The exported files hold the "
    "average over all noise levels, which no other fixed change approximates better; their images differ from those of the "
    "native file."
)


@dataclass
class TLoraOptions(LowRankOptions):
    """Options of T-LoRA."""

    min_rank: int | None = option(
        None, "rank at the highest noise level (default: half of the rank)", "T-LoRA min_rank (rank at the highest noise)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "min_rank")
        if self.min_rank is not None and self.rank is not None and self.min_rank > self.rank:
            raise InputError(f"min_rank must be in [1, rank={self.rank}], got {self.min_rank}.")


class TLora(Lora):
    """LoRA on the UNet whose rank falls with the noise level. Text encoders and classifiers have none: there its rank is r."""

    name = "t_lora"
    title = "T-LoRA"
    reference = "Soboleva et al. 2025, T-LoRA: Single Image Diffusion Model Customization Without Overfitting"
    parameters = "rank * (m + n)"
    Options = TLoraOptions
    export_note = EXPORT_NOTE
    exports_exactly = False
    # FSDP would split the rows.
    can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's learning rates, and twice its rank, of which half is left at the highest noise level."""
        return TaskDefaults(1e-4, {"rank": 8}) if task == "subject" else TaskDefaults(2e-4, {"rank": 2})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration of plain LoRA; the scaling is 1 unless alpha is given."""
        return lora_config(self.options, target_modules, exclude_modules)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample A with orthonormal rows from the probe's generator, and let the UNet's noise level choose the rank."""
        super().start(model, probe, adapter_name)
        rank = self.options.rank
        for layer in tuner_layers(model).values():
            A = layer.lora_A[adapter_name].weight
            sample = torch.randn(A[0].numel(), rank, generator=probe.generator)
            with torch.no_grad():
                # A layer with fewer inputs than rows has no more orthonormal ones.
                A[: len(sample)] = torch.linalg.qr(sample).Q.T.reshape(-1, *A.shape[1:]).to(A)
        follow_timestep(model, adapter_name, max(rank // 2, 1) if self.options.min_rank is None else self.options.min_rank)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """1 for both."""
        return 1.0

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's files of plain LoRA, with r_min in the header of the UNet's."""
        super().save(components, folder, adapter_name)
        for name, model in components.items():
            layers = (layer for layer in tuner_layers(model).values() if isinstance(layer, TimestepLayer))
            schedule = next((layer.schedules[adapter_name] for layer in layers if adapter_name in layer.schedules), None)
            if schedule is not None:
                written = read_native(folder / FULL / name)
                metadata = {METHOD_KEY: cls.name, MIN_RANK: str(schedule.min_rank)}
                write_native(folder / FULL / name, model.peft_config[adapter_name], written.tensors, metadata)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's LoRA; that of the UNet follows the noise level.

        Raises: as `AdapterMethod.load`; InputError for an r_min that is not in [1, r].
        """
        super().load(components, folder, adapter_name)
        for name, model in components.items():
            files = read_native(folder / name)
            if MIN_RANK in files.metadata:
                follow_timestep(model, adapter_name, checked_min_rank(files, folder / name))


def checked_min_rank(files: NativeFiles, source: Path) -> int:
    """r_min in the metadata of `files`. Raises: InputError naming `source` if it is not in [1, r]."""
    text, rank = files.metadata[MIN_RANK], files.config.r
    if not text.isdecimal() or not 1 <= int(text) <= rank:
        raise InputError(f"{source}: {MIN_RANK} must be in [1, r={rank}], got {text!r}. Save the adapter again.")
    return int(text)


class RankSchedule:
    """The ranks r(t) of one adapter, and the noise levels of the UNet's current call.

    Args:
        rank, min_rank: r and r_min.
    """

    def __init__(self, rank: int, min_rank: int) -> None:
        self.rank, self.min_rank = rank, min_rank
        self.timesteps: torch.Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the UNet, which is called with the timesteps: one number, or one for each image."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.timesteps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)

    def masks(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(levels, r): the diagonal of M_t for each of `timesteps` (levels,)."""
        share = (TIMESTEPS - timesteps.double().clamp(0, TIMESTEPS)) / TIMESTEPS
        ranks = ((self.rank - self.min_rank) * share).floor() + self.min_rank
        return (torch.arange(self.rank, device=timesteps.device) < ranks[:, None]).float()

    def apply(self, module: nn.Module, args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        """A forward hook of A: M_t A x, (batch, ..., r) or (batch, r, height, width)."""
        masks = self.masks(self.timesteps.to(hidden.device)).to(hidden.dtype)
        others = hidden.ndim - 2
        is_convolution = isinstance(module, nn.Conv2d)
        return hidden * masks.reshape(
            len(masks), *((self.rank, *(1,) * others) if is_convolution else (*(1,) * others, self.rank))
        )

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean (r,) and the covariance (r, r) of the diagonal of M_t over all noise levels, float64."""
        masks = self.masks(torch.arange(TIMESTEPS)).double()
        mean = masks.mean(dim=0)
        return mean, masks.T @ masks / TIMESTEPS - torch.outer(mean, mean)


def follow_timestep(model: nn.Module, adapter_name: str, min_rank: int) -> None:
    """Let the UNet's timestep choose the rank of the adapter in all its layers; another model is left as it is."""
    from diffusers import UNet2DConditionModel

    from nora_vision.factors import low_rank_factors

    if not isinstance(model, UNet2DConditionModel):
        return
    low_rank_factors.register(TimestepLayer, average_factors)
    layers = [layer for layer in tuner_layers(model).values() if adapter_name in getattr(layer, "lora_A", ())]
    schedule = RankSchedule(model.peft_config[adapter_name].r, min_rank)
    model.register_forward_pre_hook(schedule.read, with_kwargs=True)
    for layer in layers:
        layer.lora_A[adapter_name].register_forward_hook(schedule.apply)
        if not isinstance(layer, TimestepLayer):
            layer.__class__, layer.schedules = following(type(layer)), {}
        layer.schedules[adapter_name] = schedule


class TimestepLayer:
    """A mixin in front of a LoRA layer's class: merging adds s B mean(M_t) A, as the exported files do."""

    schedules: dict[str, RankSchedule]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight change averaged over all noise levels, in the shape of the weight."""
        if adapter not in self.schedules:
            return super().get_delta_weight(adapter)
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        mean = self.schedules[adapter].mean_and_covariance()[0].to(A)
        change = self.scaling[adapter] * (B.flatten(1) * mean) @ A.flatten(1)
        return change.view_as(self.get_base_layer().weight)


@cache
def following(kind: type[nn.Module]) -> type[nn.Module]:
    """The class `kind` of a LoRA layer with the mixin."""
    return type(f"Timestep{kind.__name__}", (TimestepLayer, kind), {})


@torch.no_grad()
def average_factors(layer: LoraLayer, adapter_name: str) -> Factors | None:
    """The factors of mean_t(s B M_t A) = s B mean(M_t) A, the fixed change with the least mean squared distance to s B M_t A.

    With G = (B^T B) * (A A^T), elementwise, ||B diag(d) A||_F^2 = d^T G d. So for d = diag M_t the mean squared error is
    tr(G Cov(d)), and the mean squared norm tr(G E[d d^T]).
    """
    from nora_vision.factors import has_adapter, low_rank_factors

    if not has_adapter(layer, adapter_name):
        return None
    factors = low_rank_factors.dispatch(lora_layer())(layer, adapter_name)
    if adapter_name not in layer.schedules:
        return factors
    mean, covariance = layer.schedules[adapter_name].mean_and_covariance()
    up, down = factors.up.double().cpu(), factors.down.double().cpu()
    gram = (up.T @ up) * (down @ down.T)
    error, norm = float((gram * covariance).sum()), float((gram * (covariance + torch.outer(mean, mean))).sum())
    return factors._replace(up=factors.up * mean.to(factors.up), relative_error=(max(error, 0.0) / norm) ** 0.5 if norm else 0.0)


def lora_layer() -> type[LoraLayer]:
    """PEFT's class, imported on the first call."""
    from peft.tuners.lora import LoraLayer

    return LoraLayer


METHOD = TLora
