"""EVA: h = W x + s B A x,  A starts from the directions in which x varies most, with ranks by the variance that they explain
[Paischer et al. 2024].

    covariance of x = V diag(lambda) V^T;  A_0 = V_r^T;  B_0 = 0;  directions get ranks in the order of lambda_i / sum lambda

The covariance is exact and does not depend on the order of the data, where the paper and PEFT approximate it by an incremental
decomposition of batches until that no longer changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.adapter_method import ADAPTER_NAME, MethodTraining, Probe, option, tuner_layers
from pipelines.errors import InputError
from pipelines.gradients import cached_factors, origin_of
from pipelines.lazy_modules import nn, torch
from pipelines.methods.lora import Lora, LoraOptions
from pipelines.subtracted_start import matrix_shape

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors

# A layer that saw a constant input has no variance.
SMALLEST = 1e-30


@dataclass
class EvaOptions(LoraOptions):
    """Options of EVA."""

    rho: float = option(
        2.0,
        "ratio of the largest rank of a layer to the rank; 1 gives every layer the same rank",
        "EVA rho (largest rank / rank)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1:
            raise InputError(f"rho must be at least 1, got {self.rho}. 1 gives every layer the same rank.")


class Eva(Lora):
    """LoRA whose A spans the directions in which the activations vary most; layers that need more directions get higher ranks.

    PEFT trains plain LoRA silently if its pass over the data is left out; here that pass is part of the initialisation. PEFT also
    removes the adapter of layers without a rank; here each layer has at least one.
    """

    name = "eva"
    title = "EVA"
    reference = "Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
    samples_start = False
    parameters = "rank * (m + n)"
    Options = EvaOptions

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Set A and the ranks from the activations of the base model, whose directions are cached; B is zero.

        Raises: ValueError if the probe cannot run the model.
        """
        super().start(model, probe, adapter_name)
        layers = tuner_layers(model)
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        cache = probe.cache.with_name(f"{probe.cache.stem}-{self.name}.safetensors")
        origin = origin_of(weights, [self.options.rank, self.options.rho])
        directions = cached_factors(cache, origin, lambda: self._directions(layers, probe))
        ratios = {name: each.up[0] for name, each in directions.items()}
        ranks = allocated_ranks(ratios, self.options.rank * len(layers))
        config = model.peft_config[adapter_name]
        for name, layer in layers.items():
            if ranks[name] != self.options.rank:
                self._set_rank(layer, name, ranks[name], config, adapter_name)
            A = layer.lora_A[adapter_name].weight
            with torch.no_grad():
                A.copy_(directions[name].down[: ranks[name]].view_as(A))
        config.eva_started = True

    def training(self, models: Sequence[nn.Module], total_steps: int) -> MethodTraining:
        """No hooks.

        Raises: ValueError if `start` was not called, so that plain LoRA would be trained.
        """
        if not all(getattr(model.peft_config[ADAPTER_NAME], "eva_started", False) for model in models):
            raise ValueError(f"{self.title} has not been started from the activations. Call start before training.")
        return super().training(models, total_steps)

    def _directions(self, layers: Mapping[str, LoraLayer], probe: Probe) -> Iterator[tuple[str, Factors]]:
        """For each layer, its k candidates for rows of A as `down` (k, in), and the variance that they explain as `up` (1, k)."""
        from nora_vision.factors import Factors
        from pipelines.second_moments import second_moments

        for name, moments in second_moments(layers, probe.forward):
            # Rounding may leave a variance just below zero.
            values, vectors = torch.linalg.eigh(moments.covariance)
            values = values.clamp_min(0)
            count = min(round(self.options.rho * self.options.rank), *matrix_shape(layers[name]))
            rows = vectors.T.flip(0)[:count]
            signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
            explained = (values.flip(0)[:count] / values.sum().clamp_min(SMALLEST)).float()
            yield name, Factors(explained[None].cpu(), (rows * signs).float().cpu())

    def _set_rank(self, layer: LoraLayer, name: str, rank: int, config: LoraConfig, adapter_name: str) -> None:
        """Give a layer another rank at the same scaling."""
        alpha = layer.scaling[adapter_name] * (rank**0.5 if config.use_rslora else rank)
        layer.update_layer(adapter_name, rank, alpha, config=config)
        for part in (layer.lora_A, layer.lora_B):
            part[adapter_name].float()
        config.rank_pattern[f"^{name}"], config.alpha_pattern[f"^{name}"] = rank, alpha


def allocated_ranks(explained: Mapping[str, torch.Tensor], budget: int) -> dict[str, int]:
    """The ranks of all layers, which add up to `budget`: the directions that explain most, and at least one for every layer.

    Args:
        explained: the share of the variance that each direction of a layer explains, (k,), in descending order.
    """
    ranks = dict.fromkeys(explained, 1)
    # Layers with the same input explain the same; their order must not depend on that of the mapping.
    candidates = sorted((-float(share), name) for name, shares in explained.items() for share in shares[1:])
    for _, name in candidates[: budget - len(ranks)]:
        ranks[name] += 1
    return ranks


METHOD = Eva
