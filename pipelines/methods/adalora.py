"""AdaLoRA: by PEFT,  h = W x + s B diag(e) A x,  its ranks allocated to layers while it trains  [Zhang et al. 2023]."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipelines.adapter_method import (
    ADAPTER_NAME,
    FULL,
    AdapterMethod,
    MethodTraining,
    NativeFiles,
    Probe,
    TaskDefaults,
    add_as_lora,
    read_native,
    tuner_layers,
    write_native,
)
from pipelines.errors import InputError
from pipelines.option_checks import above_zero, at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.adalora import AdaLoraLayer, RankAllocator

    from nora_vision.factors import Factors

# What PEFT adds to the rank that it divides by.
EPSILON = 1e-5
CONVOLUTION = ("groups", "kernel_size", "stride", "padding", "dilation")
MOMENTS = ("exp_avg_ipt", "exp_avg_unc")


@dataclass
class AdaLoraOptions:
    """AdaLoRA's own."""

    init_r: int | None = field(default=None, metadata={"help": "rank of every layer before ranks are allocated"})
    target_r: int | None = field(default=None, metadata={"help": "mean rank of the layers in the end, below init_r"})
    tinit_ratio: float = field(default=0.1, metadata={"help": "share of the steps before the first rank is taken away"})
    tfinal_ratio: float = field(default=0.3, metadata={"help": "share of the steps after the last rank is taken away"})
    delta_t: int = field(default=1, metadata={"help": "steps between two allocations"})
    beta1: float = field(default=0.85, metadata={"help": "decay of the mean sensitivity"})
    beta2: float = field(default=0.85, metadata={"help": "decay of the sensitivity's mean uncertainty"})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "weight of the term that keeps A and B orthogonal"})
    alpha: float | None = field(
        default=None, metadata={"help": "numerator of the scaling alpha / init_r; the scaling is 1 unless given"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout within the adapter"})

    def __post_init__(self) -> None:
        self._check_schedule()
        if self.target_r is not None and not 1 <= self.target_r < self.init_r:
            raise InputError(f"target_r must be in [1, init_r - 1 = {self.init_r - 1}], got {self.target_r}. Raise init_r.")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        at_least(self, 0, "orth_reg_weight")
        above_zero(self, "alpha")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}.")

    def _check_schedule(self) -> None:
        for name in ("tinit_ratio", "tfinal_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if self.tinit_ratio + self.tfinal_ratio >= 1:
            raise InputError(
                f"tinit_ratio + tfinal_ratio must be below 1, so that there are steps in which ranks are allocated, got "
                f"{self.tinit_ratio + self.tfinal_ratio:g}. Lower one of them."
            )
        at_least(self, 1, "delta_t")


class AdaLora(AdapterMethod):
    """AdaLoRA; the rank that a layer gets is what its triplets of e, a row of A and a column of B have earned."""

    name = "adalora"
    title = "AdaLoRA"
    reference = "Zhang et al. 2023, Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    Options = AdaLoraOptions
    # Whole rows of parameters are compared and set to zero.
    can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """LoRA's ranks in the end, and half as much again before; e starts at zero, which takes larger rates."""
        if task == "subject":
            return TaskDefaults(3e-4, {"init_r": 6, "target_r": 4})
        return TaskDefaults(1e-3, {"init_r": 3, "target_r": 2})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration; its schedule is that of no training yet."""
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

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """As every method, and with the right scale: PEFT's layers divide by the rank as they run, not in their scaling."""
        from peft.tuners.adalora import AdaLoraLayer

        from nora_vision.factors import low_rank_factors

        low_rank_factors.register(AdaLoraLayer, adalora_factors)
        super().attach(model, config, adapter_name)
        for layer in tuner_layers(model).values():
            # LoraLayer sets the scaling back to lora_alpha / r.
            layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * layer.r[adapter_name]
            base = layer.get_base_layer()
            if isinstance(base, nn.Conv2d):
                # What a LoRA asks that is loaded on top of the layer, to compare adapters.
                vars(layer).update({name: getattr(base, name) for name in CONVOLUTION})

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Sample A and B from the probe's generator; e is zero."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        for layer in tuner_layers(model).values():
            for parameter in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
                with torch.no_grad():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=probe.generator))

    def training(self, models: Sequence[nn.Module], total_steps: int) -> AdaLoraTraining:
        """The allocation over `total_steps`, and the term that keeps A and B orthogonal."""
        return AdaLoraTraining(self.options, models, total_steps)

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """PEFT's two files under `full`, without the triplets that are zero."""
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
            write_native(folder / FULL / name, config, tensors)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Add the plain LoRA that each subfolder's adapter equals.

        Raises: InputError if it does not fit the model; AdapterFileError if a file was changed.
        """
        for name, model in components.items():
            add_as_lora(model, factors_in(read_native(folder / name)), adapter_name, folder / name)


class AdaLoraTraining(MethodTraining):
    """The allocation of ranks within one training, by PEFT's allocator for each model.

    What PEFT's AdaLoraModel.update_and_allocate does, but for one thing: the last allocation is made at the first step from
    `tfinal` steps before the end that is done, also if a gradient scaler left out the very one, or nothing was compared yet.
    """

    def __init__(self, options: AdaLoraOptions, models: Sequence[nn.Module], total_steps: int) -> None:
        super().__init__(models, total_steps)
        self.weight = options.orth_reg_weight
        self.first_of_last = total_steps - int(options.tfinal_ratio * total_steps)
        for model in models:
            config = model.peft_config[ADAPTER_NAME]
            config.total_step, config.tinit = total_steps, int(options.tinit_ratio * total_steps)
            config.tfinal = total_steps - self.first_of_last
        self.load_state_dict({})

    def regularizer(self) -> torch.Tensor | None:
        """orth_reg_weight times the mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F  [eq. 4, as PEFT has it]."""
        if not self.weight:
            return None
        return self.weight * torch.stack([distance for model in self.models for distance in _distances(model)]).mean()

    def after_step(self, step: int) -> None:
        """Update the importance of all triplets, and set those to zero that are beyond the step's budget."""
        for index, (model, allocator) in enumerate(zip(self.models, self.allocators, strict=True)):
            if self.kept[index] is not None:
                # The optimiser's momentum moves triplets that are zero.
                allocator.mask_using_rank_pattern(model, self.kept[index])
            elif any(parameter.grad is None for parameter in model.parameters() if parameter.requires_grad):
                # A text encoder that is trained no more.
                continue
            elif step < self.first_of_last:
                allocator.update_and_allocate(model, step)
            else:
                self.kept[index] = _last_allocation(model, allocator)

    def state_dict(self) -> dict[str, Any]:
        """The running means of each model's allocator, by parameter, and which triplets are left in the end."""
        return {
            str(index): {"kept": self.kept[index], **{name: dict(getattr(allocator, name)) for name in MOMENTS}}
            for index, allocator in enumerate(self.allocators)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; without it, begin anew."""
        from peft.tuners.adalora import RankAllocator

        self.allocators: list[RankAllocator] = []
        self.kept: list[dict[str, list[bool]] | None] = []
        for index, model in enumerate(self.models):
            of_model = state.get(str(index), {})
            # A copy of the configuration, as another training sets that of the model anew.
            config = copy.copy(model.peft_config[ADAPTER_NAME])
            allocator, device = RankAllocator(model, config, ADAPTER_NAME), next(model.parameters()).device
            for name in MOMENTS:
                moments = {key: value.to(device) for key, value in of_model.get(name, {}).items()}
                setattr(allocator, name, moments)
                # Computed anew before it is read; a name that is missing would set the means to zero.
                allocator.ipt = {key: torch.zeros_like(value) for key, value in moments.items()}
            self.allocators.append(allocator)
            self.kept.append(of_model.get("kept"))


def _last_allocation(model: nn.Module, allocator: RankAllocator) -> dict[str, list[bool]]:
    """Allocate the final budget; returns which triplets are left, by the name of e."""
    if not allocator.ipt:
        allocator.update_ipt(model)
    return allocator.mask_to_budget(model, allocator.target_bgt)


def _distances(model: nn.Module) -> list[torch.Tensor]:
    """How far each A and B of `model` is from orthonormal rows or columns, in the Frobenius norm."""
    distances = []
    for layer in tuner_layers(model).values():
        A, B = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
        for gram in (A @ A.T, B.T @ B):
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return distances


def kept_triplets(layer: AdaLoraLayer, adapter_name: str) -> torch.Tensor:
    """Which triplets of a layer are not zero, (init_r,) bool; the first where all are, as no file holds a rank of 0."""
    keep = layer.lora_E[adapter_name].detach().flatten() != 0
    if not keep.any():
        keep[0] = True
    return keep


def adalora_factors(layer: AdaLoraLayer, adapter_name: str) -> Factors | None:
    """s B diag(e) A = (s B) (diag(e) A), of the triplets that are not zero."""
    from nora_vision.factors import Factors

    if adapter_name not in layer.lora_A:
        return None
    keep = kept_triplets(layer, adapter_name)
    A, B, e = (part[adapter_name].detach().float() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
    scale = layer.lora_alpha[adapter_name] / layer.r[adapter_name] / (float(layer.ranknum[adapter_name]) + EPSILON)
    return Factors(scale * B[:, keep], (e * A)[keep])


def factors_in(files: NativeFiles) -> dict[str, Factors]:
    """The same of a file's tensors, by the layer's name."""
    from nora_vision.factors import Factors
    from nora_vision.saving import PEFT_PREFIX

    scale = files.config.lora_alpha / (files.config.init_r + EPSILON)
    names = [name.removesuffix(".lora_E") for name in files.tensors if name.endswith(".lora_E")]
    parts = {name: [files.tensors[f"{name}.{part}"].float() for part in ("lora_A", "lora_B", "lora_E")] for name in names}
    return {name.removeprefix(PEFT_PREFIX): Factors(scale * B, e * A) for name, (A, B, e) in parts.items()}


METHOD = AdaLora
