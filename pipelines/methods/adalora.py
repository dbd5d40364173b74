"""AdaLoRA: h = W x + s B diag(e) A x,  with ranks allocated to layers during training, by PEFT  [Zhang et al. 2023]."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.adapter_method import ADAPTER_NAME, AdapterMethod, MethodTraining, Probe, TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.lora_conversion import add_as_lora
from pipelines.native_files import FULL, METHOD_KEY, NativeFiles, read_native, write_native
from pipelines.option_checks import above_zero, at_least, below_one
from pipelines.run_options import Task
from pipelines.scalable_layers import expose_convolution

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.adalora import AdaLoraLayer, RankAllocator

    from nora_vision.factors import Factors

# PEFT adds this to the rank before dividing by it.
EPSILON = 1e-5
PARTS = ("lora_A", "lora_B", "lora_E")
MOMENTS = ("exp_avg_ipt", "exp_avg_unc")


@dataclass
class AdaLoraOptions:
    """Options of AdaLoRA."""

    init_r: int | None = option(None, "initial rank of every layer", "AdaLoRA init_r (initial rank)")
    target_r: int | None = option(
        None, "average rank of the layers after allocation, below init_r", "AdaLoRA target_r (final average rank)"
    )
    tinit_ratio: float = option(
        0.1, "share of the steps before ranks are first reduced", "AdaLoRA tinit (share of steps at full rank)"
    )
    tfinal_ratio: float = option(
        0.3, "share of the steps trained at the final ranks", "AdaLoRA tfinal (share of steps at final ranks)"
    )
    delta_t: int = option(1, "steps between rank updates", "AdaLoRA delta_t (steps between rank updates)")
    beta1: float = option(0.85, "EMA decay of the sensitivity", "AdaLoRA beta1 (EMA of the sensitivity)")
    beta2: float = option(0.85, "EMA decay of the uncertainty", "AdaLoRA beta2 (EMA of the uncertainty)")
    orth_reg_weight: float = option(
        0.1, "weight of the orthogonality regularisation", "AdaLoRA orthogonality regularisation weight"
    )
    alpha: float | None = option(None, "numerator of the scaling alpha / init_r (default: the scaling is 1)")
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        self._check_schedule()
        if self.target_r is not None and not 1 <= self.target_r < self.init_r:
            raise InputError(
                f"target_r must be in [1, init_r - 1 = {self.init_r - 1}], got {self.target_r}. Lower target_r or raise init_r."
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        at_least(self, 0, "orth_reg_weight")
        above_zero(self, "alpha")
        below_one(self, "dropout")

    def _check_schedule(self) -> None:
        for name in ("tinit_ratio", "tfinal_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.tinit_ratio + self.tfinal_ratio >= 1:
            raise InputError(
                f"tinit_ratio + tfinal_ratio must be below 1 to leave steps for rank allocation, got "
                f"{self.tinit_ratio + self.tfinal_ratio:g}. Lower one of them."
            )
        at_least(self, 1, "delta_t")


class AdaLora(AdapterMethod):
    """AdaLoRA, which prunes the least important triplets (an entry of e, a row of A, a column of B) over all layers."""

    name = "adalora"
    title = "AdaLoRA"
    reference = "Zhang et al. 2023, Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    parameters = "init_r * (m + n + 1)"
    Options = AdaLoraOptions
    rank_option = "init_r"
    # Allocation needs whole rows of parameters, which FSDP would split.
    can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's rank as the target, and 1.5 times that as the initial rank; as e starts at zero, learning rates are higher."""
        if task == "subject":
            return TaskDefaults(3e-4, {"init_r": 6, "target_r": 4})
        return TaskDefaults(1e-3, {"init_r": 3, "target_r": 2})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration; `training` sets its schedule."""
        from peft import AdaLoraConfig

        options = self.options
        return AdaLoraConfig(
            init_r=options.init_r,
            target_r=options.target_r,
            lora_alpha=options.init_r if options.alpha is None else options.alpha,
            lora_dropout=options.dropout,
            deltaT=options.delta_t,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orth_reg_weight,
            total_step=1,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter, and correct `lora_alpha`: PEFT's layers divide by the rank in `forward`, not in `scaling`."""
        from peft.tuners.adalora import AdaLoraLayer

        from nora_vision.factors import low_rank_factors

        low_rank_factors.register(AdaLoraLayer, adalora_factors)
        super().attach(model, config, adapter_name, generator)
        for layer in tuner_layers(model).values():
            # LoraLayer.set_scale multiplies by lora_alpha / r.
            layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * layer.r[adapter_name]
            expose_convolution(layer)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample A and B from the probe's generator; e stays zero."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        for layer in tuner_layers(model).values():
            for parameter in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                with torch.no_grad():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=probe.generator))

    def training(self, models: Sequence[nn.Module], total_steps: int) -> AdaLoraTraining:
        """Rank allocation over `total_steps`, and the orthogonality regularisation."""
        return AdaLoraTraining(self.options, models, total_steps)

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's two files to `full`, without pruned triplets."""
        from nora_vision.calibration import base_name
        from nora_vision.saving import PEFT_PREFIX

        for name, model in components.items():
            config, tensors = copy.deepcopy(model.peft_config[adapter_name]), {}
            config.rank_pattern = {}
            for layer_name, layer in tuner_layers(model).items():
                keep = kept_triplets(layer, adapter_name)
                base = base_name(layer_name)
                config.rank_pattern[f"{base}.lora_E"] = keep.tolist()
                parts = {"lora_A": layer.lora_A[adapter_name][keep], "lora_B": layer.lora_B[adapter_name][:, keep]}
                parts["lora_E"] = layer.lora_E[adapter_name][keep]
                tensors |= {f"{PEFT_PREFIX}{base}.{part}": value.detach() for part, value in parts.items()}
            write_native(folder / FULL / name, config, tensors, {METHOD_KEY: cls.name})

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's adapter as the plain LoRA that equals it.

        Raises: InputError if it does not fit the model; AdapterFileError if a file was changed after it was saved.
        """
        for name, model in components.items():
            try:
                factors = factors_in(read_native(folder / name))
            except ValueError as error:
                raise InputError(f"{folder / name} is no adapter of AdaLoRA: {error}") from error
            add_as_lora(model, factors, adapter_name, folder / name)


class AdaLoraTraining(MethodTraining):
    """Rank allocation during one training run, with PEFT's `RankAllocator` for each model.

    It does what PEFT's `AdaLoraModel.update_and_allocate` does, with one difference: PEFT makes the final allocation exactly
    `tfinal` steps before the end, and misses it if a gradient scaler skips that step. Here, the next step makes it.
    """

    def __init__(self, options: AdaLoraOptions, models: Sequence[nn.Module], total_steps: int) -> None:
        super().__init__(models, total_steps)
        self.weight = options.orth_reg_weight
        self.final_allocation_step = total_steps - int(options.tfinal_ratio * total_steps)
        for model in models:
            config = model.peft_config[ADAPTER_NAME]
            config.total_step, config.tinit = total_steps, int(options.tinit_ratio * total_steps)
            config.tfinal = total_steps - self.final_allocation_step
        self.load_state_dict({})

    def regularizer(self) -> torch.Tensor | None:
        """A scalar: orth_reg_weight times the mean of ||A A^T - I||_F and ||B^T B - I||_F  [eq. 4, as in PEFT]."""
        if not self.weight:
            return None
        return self.weight * torch.stack([distance for model in self.models for distance in _distances(model)]).mean()

    def after_step(self, step: int) -> None:
        """Update the importance of all triplets, and zero those that exceed the rank budget of the step."""
        for index, (model, allocator) in enumerate(zip(self.models, self.allocators, strict=True)):
            if self.kept[index] is not None:
                # The optimiser's momentum moves pruned triplets away from zero.
                allocator.mask_using_rank_pattern(model, self.kept[index])
            elif any(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad):
                # This text encoder is no longer trained.
                continue
            elif step < self.final_allocation_step:
                allocator.update_and_allocate(model, step)
            else:
                self.kept[index] = _last_allocation(model, allocator)

    def state_dict(self) -> dict[str, Any]:
        """For each model, the allocator's moving averages by parameter, and the triplets that the final allocation kept."""
        return {
            str(index): {"kept": self.kept[index], **{name: dict(getattr(allocator, name)) for name in MOMENTS}}
            for index, allocator in enumerate(self.allocators)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; an empty state resets all."""
        from peft.tuners.adalora import RankAllocator

        self.allocators: list[RankAllocator] = []
        self.kept: list[dict[str, list[bool]] | None] = []
        for index, model in enumerate(self.models):
            of_model = state.get(str(index), {})
            # A copy, as another training run changes the model's configuration.
            config = copy.copy(model.peft_config[ADAPTER_NAME])
            allocator, device = RankAllocator(model, config, ADAPTER_NAME), next(model.parameters()).device
            for name in MOMENTS:
                moments = {key: value.to(device) for key, value in of_model.get(name, {}).items()}
                setattr(allocator, name, moments)
                # Overwritten before it is read; the allocator resets the averages of names that are missing here.
                allocator.ipt = {key: torch.zeros_like(value) for key, value in moments.items()}
            self.allocators.append(allocator)
            self.kept.append(of_model.get("kept"))


def _last_allocation(model: nn.Module, allocator: RankAllocator) -> dict[str, list[bool]]:
    """Allocate the final budget; returns which triplets are kept, by the name of e."""
    if not allocator.ipt:
        allocator.update_ipt(model)
    return allocator.mask_to_budget(model, allocator.target_bgt)


def _distances(model: nn.Module) -> list[torch.Tensor]:
    """||A A^T - I||_F and ||B^T B - I||_F for each layer of `model`, as scalars."""
    distances = []
    for layer in tuner_layers(model).values():
        A, B = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
        for gram in (A @ A.T, B.T @ B):
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return distances


def kept_triplets(layer: AdaLoraLayer, adapter_name: str) -> torch.Tensor:
    """Which triplets of a layer are not zero, (init_r,) bool. If all are, the first one is kept, as files need a rank of 1."""
    keep = layer.lora_E[adapter_name].detach().flatten() != 0
    if not keep.any():
        keep[0] = True
    return keep


def adalora_factors(layer: AdaLoraLayer, adapter_name: str) -> Factors | None:
    """The weight change as up = s B (out, k) and down = diag(e) A (k, in), where k counts the triplets that are not zero."""
    from nora_vision.factors import Factors

    if adapter_name not in layer.lora_A:
        return None
    keep = kept_triplets(layer, adapter_name)
    A, B, e = (part[adapter_name].detach().float() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
    scale = layer.lora_alpha[adapter_name] / layer.r[adapter_name] / (float(layer.ranknum[adapter_name]) + EPSILON)
    return Factors(scale * B[:, keep], (e * A)[keep])


def factors_in(files: NativeFiles) -> dict[str, Factors]:
    """The factors of `adalora_factors` from a file's tensors, by layer name.

    Raises: ValueError if init_r is not a positive integer, or naming a tensor that is missing, unknown, or of another shape.
    """
    from nora_vision.factors import Factors
    from nora_vision.saving import PEFT_PREFIX

    init_r = files.config.init_r
    if type(init_r) is not int or init_r < 1:
        raise ValueError(f"init_r must be an integer of at least 1, got {init_r!r}.")
    scale = files.config.lora_alpha / (init_r + EPSILON)
    return {name.removeprefix(PEFT_PREFIX): Factors(scale * B, e * A) for name, A, B, e in _triplets(files.tensors)}


def _triplets(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The name of each layer, with A (k, in), B (out, k) and e (k, 1) in float32; raises as `factors_in`."""
    names = sorted({name.rpartition(".")[0] for name in tensors})
    unmatched = sorted({f"{name}.{part}" for name in names for part in PARTS} ^ tensors.keys())
    if unmatched:
        raise ValueError(f"each layer must have {', '.join(PARTS)}, but {unmatched[0]!r} is missing or unknown.")
    for name in names:
        A, B, e = parts = [tensors[f"{name}.{part}"].float() for part in PARTS]
        shapes, k = [tuple(part.shape) for part in parts], e.numel()
        if not k or shapes != [(k, A.numel() // k), (B.numel() // k, k), (k, 1)]:
            raise ValueError(
                f"the tensors of {name!r} must have the shapes (k, in), (out, k) and (k, 1), got {', '.join(map(str, shapes))}."
            )
        yield name, A, B, e


METHOD = AdaLora
