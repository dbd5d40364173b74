"""EVA: h = W x + s B A x,  A starts as the leading right singular vectors of X, with ranks by the variance that they explain
[Paischer et al. 2024]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipelines.adapter_method import Probe, option, tuner_layers
from pipelines.cached_factors import factors_from
from pipelines.errors import InputError
from pipelines.methods.lora import Lora, LoraOptions

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from nora_vision.factors import Factors


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
    """LoRA whose A spans the directions in which the activations X vary most; layers that need more directions get higher ranks.

    PEFT trains plain LoRA silently if its pass over the data is left out; here that pass is part of the initialisation.
    """

    name = "eva"
    title = "EVA"
    reference = "Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
    samples_start = False
    parameters = "rank * (m + n)"
    Options = EvaOptions
    adapts_convolutions = False

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Set A and the ranks from the activations of the base model, whose directions are cached; B is zero.

        Raises: ValueError if the probe cannot run the model.
        """
        super().start(model, probe, adapter_name)
        layers = tuner_layers(model)
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        directions = factors_from(probe.cache, self.name, self.options, weights, lambda: self._directions(layers, probe))
        ratios = {name: each.up[0] for name, each in directions.items()}
        ranks = allocated_ranks(ratios, self.options.rank * len(layers))
        config = model.peft_config[adapter_name]
        for name, layer in layers.items():
            if ranks[name] != self.options.rank:
                self._set_rank(layer, name, ranks[name], config, adapter_name)
            A = layer.lora_A[adapter_name].weight
            with torch.no_grad():
                A.copy_(directions[name].down[: ranks[name]])

    def _directions(self, layers: Mapping[str, LoraLayer], probe: Probe) -> dict[str, Factors]:
        """For each layer, its k candidates for rows of A as `down` (k, in), and the variance that they explain as `up` (1, k)."""
        from nora_vision.factors import Factors
        from pipelines.second_moments import second_moments

        directions = {}
        for name, moment in second_moments(layers, probe.forward).items():
            values, vectors = torch.linalg.eigh(moment.double())
            count = min(round(self.options.rho * self.options.rank), layers[name].in_features, layers[name].out_features)
            rows = vectors.T.flip(0)[:count]
            signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
            explained = (values.flip(0)[:count] / values.sum()).float()
            directions[name] = Factors(explained[None], (rows * signs).float())
        return directions

    def _set_rank(self, layer: LoraLayer, name: str, rank: int, config: object, adapter_name: str) -> None:
        """Give a layer another rank at the same scaling."""
        alpha = config.lora_alpha * rank / config.r
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
