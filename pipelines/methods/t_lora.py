"""T-LoRA: h = W x + s (B S M_t A - B_0 S_0 M_t A_0) x,  M_t keeps the first r(t) of r rows  [Soboleva et al. 2025].

    r(t) = floor((r - r_min) (T - t) / T) + r_min

At the noisiest steps, which decide the layout of an image, only r_min directions can overfit to a single training image. With
Ortho-LoRA the columns of B_0 and the rows of A_0 are orthonormal, so that the directions which M_t removes are no copy of those
that it keeps. The diagonal S is trained too. Without Ortho-LoRA only A starts orthonormal: h = W x + s B M_t A x, with a zero B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import (
    ADAPTER_NAME,
    LowRankOptions,
    MethodTraining,
    Probe,
    TaskDefaults,
    option,
    tuner_layers,
)
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, no_grad, parametrizations, parametrize, torch
from pipelines.lora_conversion import as_lora
from pipelines.methods.lora import Lora, lora_config
from pipelines.native_files import FULL, METHOD_KEY, NativeFiles, read_native, write_native
from pipelines.option_checks import at_least
from pipelines.run_options import Task
from pipelines.subtracted_start import check_groups, matrix_shape

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors

# T, the number of noise levels of SDXL.
TIMESTEPS = 1000
# Metadata keys: r_min, and r, of which the files of Ortho-LoRA have twice as many rows.
MIN_RANK = "t_lora_min_rank"
RANK = "t_lora_rank"
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

    ortho_lora: bool = option(
        True,
        "Ortho-LoRA: start from orthonormal factors, which are subtracted, and train their scales too",
        before_it_existed=False,
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
    parameters = "rank * (m + n + ortho_lora)"
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

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter; with Ortho-LoRA, add S, and let `start` decide what is subtracted.

        Raises: InputError naming a convolution with groups.
        """
        super().attach(model, config, adapter_name, generator)
        for name, layer in tuner_layers(model).items() if self.options.ortho_lora else ():
            check_groups(layer, name)
            for module, with_start in (
                (layer.lora_A, parametrizations.ScaledRowsLessStart),
                (layer.lora_B, parametrizations.ColumnsLessStart),
            ):
                weight = module[adapter_name].weight
                parametrize.register_parametrization(module[adapter_name], "weight", with_start(weight.float()), unsafe=True)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample the orthonormal factors from the probe's generator, and let the UNet's noise level choose the rank."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        rank, min_rank, scales = self.options.rank, self.options.min_rank, SmallestScales(self.options.rank, probe.generator)
        for layer in tuner_layers(model).values():
            A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if self.options.ortho_lora:
                start_orthonormal(A, B, scales.of(*matrix_shape(layer)), probe.generator)
            else:
                fill_rows(A.weight, A.weight[0].numel(), probe.generator)
        model.peft_config[adapter_name].t_lora_started = True
        copies = 2 if self.options.ortho_lora else 1
        follow_timestep(model, adapter_name, RankSchedule(rank, max(rank // 2, 1) if min_rank is None else min_rank, copies))

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """No hooks.

        Raises: ValueError if `start` was not called, so that plain LoRA would be trained.
        """
        if not all(getattr(model.peft_config[ADAPTER_NAME], "t_lora_started", False) for model in models):
            raise ValueError(f"{self.title} has not been started from orthonormal factors. Call start before training.")
        return super().training(models, total_steps)

    def learning_rate_factor(self, parameter_name: str) -> float:
        """1 for both."""
        return 1.0

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's files of plain LoRA, of rank 2r with Ortho-LoRA; r_min and r are in the header of the UNet's."""
        from nora_vision.calibration import base_name
        from nora_vision.factors import has_adapter, in_weight_shape

        for name, model in components.items():
            layers = {key: layer for key, layer in tuner_layers(model).items() if has_adapter(layer, adapter_name)}
            factors = {
                base_name(key): in_weight_shape(layer.get_base_layer(), full_rank_factors(layer, adapter_name))
                for key, layer in layers.items()
            }
            config, tensors = as_lora(factors)
            schedules = list(filter(None, (schedule_at(layer, adapter_name) for layer in layers.values())))
            ranks = {MIN_RANK: str(schedules[0].min_rank), RANK: str(schedules[0].rank)} if schedules else {}
            write_native(folder / FULL / name, config, tensors, {METHOD_KEY: cls.name, **ranks})

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's LoRA; that of the UNet follows the noise level.

        Raises: as `AdapterMethod.load`; InputError for an r_min that is not in [1, r], or an r that the file cannot have.
        """
        super().load(components, folder, adapter_name)
        for name, model in components.items():
            files = read_native(folder / name)
            if MIN_RANK in files.metadata:
                follow_timestep(model, adapter_name, schedule_of(files, folder / name))


def schedule_of(files: NativeFiles, source: Path) -> RankSchedule:
    """The schedule in the metadata of `files`; without an r there, r is the rank of the file.

    Raises: InputError naming `source` if r is neither the file's rank nor half of it, or r_min is not in [1, r].
    """
    rows = files.config.r
    allowed = [str(rows // copies) for copies in (1, 2) if rows % copies == 0]
    rank = files.metadata.get(RANK, str(rows))
    if rank not in allowed:
        raise InputError(f"{source}: {RANK} must be one of {', '.join(allowed)}, got {rank!r}. Save the adapter again.")
    minimum = files.metadata[MIN_RANK]
    if not minimum.isdecimal() or not 1 <= int(minimum) <= int(rank):
        raise InputError(f"{source}: {MIN_RANK} must be in [1, r={rank}], got {minimum!r}. Save the adapter again.")
    return RankSchedule(int(rank), int(minimum), rows // int(rank))


class SmallestScales:
    """S_0: the r smallest singular values of a matrix R of entries N(0, 1 / r^2), one R for all weights of a shape.

    The singular vectors of R are uniformly distributed and do not depend on its singular values, so that B_0 and A_0, which the
    paper takes from R too, are sampled for each layer without its decomposition.
    """

    def __init__(self, rank: int, generator: torch.Generator) -> None:
        self.rank, self.generator = rank, generator
        self._of_shape: dict[tuple[int, int], torch.Tensor] = {}

    def of(self, rows: int, columns: int) -> torch.Tensor:
        """(min(r, rows, columns),), in descending order."""
        if (rows, columns) not in self._of_shape:
            R = torch.randn(rows, columns, generator=self.generator) / self.rank
            self._of_shape[rows, columns] = torch.linalg.svdvals(R)[-self.rank :]
        return self._of_shape[rows, columns]


@no_grad
def fill_rows(weight: torch.Tensor, count: int, generator: torch.Generator) -> None:
    """Set the first `count` rows of `weight` (r, ...), or as many as can be, to orthonormal ones."""
    sample = torch.randn(weight[0].numel(), len(weight), generator=generator)
    rows = torch.linalg.qr(sample).Q.T[:count]
    weight[: len(rows)] = rows.reshape(-1, *weight.shape[1:]).to(weight)


@no_grad
def start_orthonormal(A: nn.Module, B: nn.Module, scales: torch.Tensor, generator: torch.Generator) -> None:
    """Set A_0, B_0 and S_0, and subtract them; rows beyond the k `scales` start as in LoRA, with a zero column of B."""
    rows, columns = A.parametrizations.weight, B.parametrizations.weight
    rows[0].scales.fill_(1)
    rows[0].scales[: len(scales)] = scales.to(rows[0].scales)
    fill_rows(rows.original, len(rows.original), generator)
    columns.original.zero_()
    fill_rows(columns.original.transpose(0, 1), len(scales), generator)
    rows[0].start.copy_((rows[0].scales * rows.original.flatten(1).T).T.view_as(rows.original))
    columns[0].start.copy_(columns.original)


class RankSchedule:
    """The ranks r(t) of one adapter, and the noise levels of the UNet's current call.

    Args:
        rank, min_rank: r and r_min.
        copies: how many times r rows A has; with Ortho-LoRA two, the first [A] and then [A - A_0].
    """

    def __init__(self, rank: int, min_rank: int, copies: int = 1) -> None:
        self.rank, self.min_rank, self.copies = rank, min_rank, copies
        self.timesteps: torch.Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the UNet, which is called with the timesteps: one number, or one for each image."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.timesteps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)

    def masks(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(levels, copies * r): the diagonal of M_t for each of `timesteps` (levels,), repeated."""
        share = (TIMESTEPS - timesteps.double().clamp(0, TIMESTEPS)) / TIMESTEPS
        ranks = ((self.rank - self.min_rank) * share).floor() + self.min_rank
        return (torch.arange(self.rank, device=timesteps.device) < ranks[:, None]).float().repeat(1, self.copies)

    def apply(self, module: nn.Module, args: tuple[Any, ...], hidden: torch.Tensor) -> torch.Tensor:
        """A forward hook of A: M_t A x, (batch, ..., copies * r) or (batch, copies * r, height, width)."""
        masks = self.masks(self.timesteps.to(hidden.device)).to(hidden.dtype)
        others = hidden.ndim - 2
        rows = masks.shape[1]
        is_convolution = isinstance(module, nn.Conv2d)
        return hidden * masks.reshape(len(masks), *((rows, *(1,) * others) if is_convolution else (*(1,) * others, rows)))

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean (k,) and the covariance (k, k) of the diagonal of M_t over all noise levels, float64, k = copies * r."""
        masks = self.masks(torch.arange(TIMESTEPS)).double()
        mean = masks.mean(dim=0)
        return mean, masks.T @ masks / TIMESTEPS - torch.outer(mean, mean)


def follow_timestep(model: nn.Module, adapter_name: str, schedule: RankSchedule) -> None:
    """Let the UNet's timestep choose the rank of the adapter in all its layers; another model is left as it is."""
    from diffusers import UNet2DConditionModel

    from nora_vision.factors import low_rank_factors

    if not isinstance(model, UNet2DConditionModel):
        return
    low_rank_factors.register(TimestepLayer, average_factors)
    layers = [layer for layer in tuner_layers(model).values() if adapter_name in getattr(layer, "lora_A", ())]
    model.register_forward_pre_hook(schedule.read, with_kwargs=True)
    for layer in layers:
        # On the adapter's own module, so that it is deleted with the adapter.
        layer.lora_A[adapter_name].rank_schedule = schedule
        layer.lora_A[adapter_name].register_forward_hook(schedule.apply)
        if not isinstance(layer, TimestepLayer):
            layer.__class__ = following(type(layer))


def schedule_at(layer: nn.Module, adapter_name: str) -> RankSchedule | None:
    """The schedule that the adapter follows in `layer`; None if its rank is the same at all noise levels."""
    return getattr(layer.lora_A[adapter_name], "rank_schedule", None)


class TimestepLayer:
    """A mixin in front of a LoRA layer's class: merging adds s B mean(M_t) A, as the exported files do."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight change averaged over all noise levels, in the shape of the weight."""
        schedule = schedule_at(self, adapter)
        if schedule is None:
            return super().get_delta_weight(adapter)
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        mean = schedule.mean_and_covariance()[0].to(A)
        change = self.scaling[adapter] * (B.flatten(1) * mean) @ A.flatten(1)
        return change.view_as(self.get_base_layer().weight)


@cache
def following(kind: type[nn.Module]) -> type[nn.Module]:
    """The class `kind` of a LoRA layer with the mixin."""
    return type(f"Timestep{kind.__name__}", (TimestepLayer, kind), {})


@no_grad
def average_factors(layer: LoraLayer, adapter_name: str) -> Factors | None:
    """The factors of mean_t(s B M_t A) = s B mean(M_t) A, the fixed change with the least mean squared distance to s B M_t A.

    With G = (B^T B) * (A A^T), elementwise, ||B diag(d) A||_F^2 = d^T G d. So for d = diag M_t the mean squared error is
    tr(G Cov(d)), and the mean squared norm tr(G E[d d^T]).
    """
    from nora_vision.factors import has_adapter

    if not has_adapter(layer, adapter_name):
        return None
    factors = full_rank_factors(layer, adapter_name)
    schedule = schedule_at(layer, adapter_name)
    if schedule is None:
        return factors
    mean, covariance = schedule.mean_and_covariance()
    up, down = factors.up.double().cpu(), factors.down.double().cpu()
    gram = (up.T @ up) * (down @ down.T)
    error, norm = float((gram * covariance).sum()), float((gram * (covariance + torch.outer(mean, mean))).sum())
    return factors._replace(up=factors.up * mean.to(factors.up), relative_error=(max(error, 0.0) / norm) ** 0.5 if norm else 0.0)


def full_rank_factors(layer: LoraLayer, adapter_name: str) -> Factors:
    """The factors of the change where M_t keeps all rows."""
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import low_rank_factors

    return low_rank_factors.dispatch(LoraLayer)(layer, adapter_name)


METHOD = TLora
