"""VeRA: h = W x + diag(b) B diag(d) A x,  with random A and B that all layers share, by PEFT  [Kopiczko et al. 2024]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import Probe, TaskDefaults, option
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import at_least, below_one
from pipelines.peft_method import LARGEST_SEED
from pipelines.run_options import Task
from pipelines.shared_state import SharedStateMethod

if TYPE_CHECKING:
    from peft import PeftConfig, VeraConfig
    from peft.tuners.vera import VeraLayer

    from nora_vision.factors import Factors


@dataclass
class VeraOptions:
    """Options of VeRA."""

    rank: int | None = option(None, "rank of the shared random matrices", **{"few-shot": "vera_rank"})
    dropout: float = option(0.0, "dropout probability within the adapter")
    d_initial: float = option(0.1, "initial value of the vector d", "VeRA d_initial (initial value of the vector d)")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        below_one(self, "dropout")
        if self.d_initial == 0:
            raise InputError("d_initial must not be 0: no parameter would get a gradient. PEFT's default is 0.1.")


class Vera(SharedStateMethod):
    """VeRA. A and B are generated from a PRNG key, so that a file holds only the vectors b and d and a digest of A and B."""

    name = "vera"
    title = "VeRA"
    reference = "Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation"
    parameters = "m + rank"
    Options = VeraOptions
    adapts_quantized_layers = True
    config_class = "VeraConfig"
    rank_option = None
    fields: ClassVar = {"rank": "r", "dropout": "vera_dropout"}
    settings: ClassVar = {"save_projection": False}
    seed_field = "projection_prng_key"
    digest_key, sizes_key = "vera_projections_sha256", "vera_largest_in_and_out"
    sized = "the largest in_features and out_features of the adapted layers"

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's rank for vision; vectors need higher learning rates than matrices."""
        rank = {"rank": 64 if built_in else 256}
        return TaskDefaults(3e-3 if task == "subject" else 1e-3, rank)

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration."""
        with warnings.catch_warnings():
            # PEFT warns that other machines may generate other A and B; their digest is checked on loading.
            warnings.simplefilter("ignore")
            return super().config(target_modules, exclude_modules)

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Generate A and B from a key that is sampled from the probe's generator."""
        super().start(model, probe, adapter_name)
        config = model.peft_config[adapter_name]
        config.projection_prng_key = int(torch.randint(LARGEST_SEED, (), generator=probe.generator))
        self.complete(list(self.layers_of(model).values()), config, adapter_name)

    @classmethod
    def complete(cls, layers: Sequence[VeraLayer], config: PeftConfig, adapter_name: str) -> None:
        """Generate A and B in float32; PEFT rounds them to the weights' precision, in which they would have another digest."""
        A, B = layers[0].vera_A, layers[0].vera_B
        values = random_projections(config, A[adapter_name].shape[1], B[adapter_name].shape[0])
        A[adapter_name], B[adapter_name] = values["A"].to(A[adapter_name].device), values["B"].to(B[adapter_name].device)

    @classmethod
    def generated(cls, layers: Mapping[str, VeraLayer], adapter_name: str) -> dict[str, torch.Tensor]:
        """A (r, largest in) and B (largest out, r), which all layers share."""
        layer = next(iter(layers.values()))
        return {"A": layer.vera_A[adapter_name], "B": layer.vera_B[adapter_name]}

    @classmethod
    def sizes_of(cls, generated: Mapping[str, torch.Tensor]) -> str:
        """The largest in_features and out_features of the adapted layers."""
        return f"{generated['A'].shape[1]} and {generated['B'].shape[0]}"

    @staticmethod
    def factors_of(layer: VeraLayer, adapter_name: str) -> Factors:
        """The weight change as up = diag(b) B (out_features, r) and down = diag(d) A (r, in_features)."""
        from nora_vision.factors import Factors

        b, d = layer.vera_lambda_b[adapter_name].float(), layer.vera_lambda_d[adapter_name].float()
        A, B = layer.vera_A[adapter_name][:, : layer.in_features], layer.vera_B[adapter_name][: layer.out_features]
        return Factors(b[:, None] * B.to(b), d[:, None] * A.to(d))


def random_projections(config: VeraConfig, largest_in: int, largest_out: int) -> dict[str, torch.Tensor]:
    """A (r, largest in) and B (largest out, r) from the configuration's key, as PEFT generates them."""
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(config.projection_prng_key)
    return {"A": _kaiming_init((config.r, largest_in), generator), "B": _kaiming_init((largest_out, config.r), generator)}


METHOD = Vera
