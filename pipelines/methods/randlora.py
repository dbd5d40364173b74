"""RandLoRA: h = W x + s sum_i B_i diag(l_i) A diag(g_i) x,  with random A and B_i for all, by PEFT  [Albert et al. 2025]."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import above_zero, at_least, below_one
from pipelines.peft_method import LARGEST_SEED, PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners._buffer_dict import BufferDict

# Metadata key: the digest of A and B, which are not in the file.
BASES = "randlora_bases_sha256"


@dataclass
class RandloraOptions:
    """Options of RandLoRA."""

    rank: int | None = option(None, "rank of each random matrix; a lower one trains more", **{"few-shot": "randlora_rank"})
    alpha: float | None = option(None, "numerator of the scaling alpha / rank (default: 20 times the rank)")
    dropout: float = option(0.0, "dropout probability within the adapter")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        above_zero(self, "alpha")
        below_one(self, "dropout")


class Randlora(PeftMethod):
    """RandLoRA, a change of full rank from as many random matrices as it takes.

    They are generated from a key in the file, which holds their digest.
    """

    name = "randlora"
    title = "RandLoRA"
    reference = "Albert et al. 2025, RandLoRA: Full-rank parameter-efficient fine-tuning of large models"
    parameters = "-(-min(m, n) // rank) * (rank + min(m, n))"
    Options = RandloraOptions
    config_class = "RandLoraConfig"
    adapts_quantized_layers = True
    fields: ClassVar = {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"}
    settings: ClassVar = {"save_projection": False}
    adapts_convolutions = False
    # All layers share A and B.
    can_be_sharded = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """PEFT's rank, with a rate that suits the large scaling."""
        return TaskDefaults(5e-5, {"rank": 16 if built_in else 32})

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration, with alpha = 20 rank by default."""
        with warnings.catch_warnings():
            # PEFT warns that other machines may generate other matrices; their digest is checked on loading.
            warnings.simplefilter("ignore")
            config = super().config(target_modules, exclude_modules)
        if self.options.alpha is None:
            config.randlora_alpha = 20 * self.options.rank
        return config

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter, with random matrices that depend on `generator`."""
        config.projection_prng_key = int(torch.randint(LARGEST_SEED, (), generator=generator))
        super().attach(model, config, adapter_name, generator)

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter, beside others with their own matrices: PEFT allows one key only, and forgets the other matrices.

        Raises: ValueError for a layer that has a RandLoRA adapter of another rank, for which PEFT's layer has no place.
        """
        others = {name: layer for name, layer in tuner_layers(model).items() if getattr(layer, "randlora_lambda", {})}
        for name, layer in others.items():
            if (rank := min(layer.r.values())) != config.r:
                raise ValueError(f"{name!r} has a RandLoRA adapter of rank {rank}, not {config.r}. Delete it first.")
        before = {name: (dict(layer.randlora_A.items()), dict(layer.randlora_B.items())) for name, layer in others.items()}
        with _one_key(getattr(model, "peft_config", {}), config.projection_prng_key):
            super().inject(model, config, adapter_name)
        for name, (A, B) in before.items():
            others[name].randlora_A.update(A)
            others[name].randlora_B.update(B)
        _generate_in_float32(model, config, adapter_name)

    @classmethod
    def file_metadata(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """The digest of A and B."""
        return {BASES: _digest(model, adapter_name)}

    @classmethod
    def check_loaded(cls, model: nn.Module, adapter_name: str, metadata: Mapping[str, str], source: Path) -> None:
        """Compare A and B with the digest.

        Raises: InputError if there is no digest; AdapterFileError if they differ.
        """
        from nora_vision.files import AdapterFileError

        if BASES not in metadata:
            raise InputError(f"{source} has no digest of its shared random matrices. Load it with PEFT, or train it again here.")
        # Earlier versions had them in the precision of the weights.
        precisions = (torch.float32, torch.bfloat16, torch.float16)
        if metadata.get(BASES) not in [_digest(model, adapter_name, dtype) for dtype in precisions]:
            raise AdapterFileError(
                f"{source}: the key {model.peft_config[adapter_name].projection_prng_key} gives other shared random matrices "
                "here than where the adapter was saved. Use the file exported for diffusers."
            )


@contextmanager
def _one_key(configs: Mapping[str, PeftConfig], key: int) -> Iterator[None]:
    """A context in which all RandLoRA configurations have this key."""
    keys = {name: config.projection_prng_key for name, config in configs.items() if config.peft_type == "RANDLORA"}
    for name in keys:
        configs[name].projection_prng_key = key
    try:
        yield
    finally:
        for name, key in keys.items():
            configs[name].projection_prng_key = key


def _bases(model: nn.Module, adapter_name: str) -> tuple[BufferDict, BufferDict]:
    """The dictionaries, by adapter, of A (r, 1, smallest side) and B (largest side, count, r), which all layers share."""
    layer = next(layer for layer in tuner_layers(model).values() if adapter_name in getattr(layer, "randlora_lambda", ()))
    return layer.randlora_A, layer.randlora_B


def _generate_in_float32(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Generate A and B again as PEFT does, which rounds them to the weights' precision afterwards."""
    from peft.tuners.randlora.model import _kaiming_init

    A, B = _bases(model, adapter_name)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    largest, count, rank = B[adapter_name].shape
    of_A = _kaiming_init(tuple(A[adapter_name].shape), generator)
    of_B = torch.cat([_kaiming_init((largest, 1, rank), generator) for _ in range(count)], dim=1)
    for bases, values in ((A, of_A), (B, of_B)):
        bases[adapter_name] = (values / values.std()).to(bases[adapter_name].device, torch.float32)


def _digest(model: nn.Module, adapter_name: str, dtype: torch.dtype | None = None) -> str:
    """The digest of A and B in this precision, by default float32."""
    from pipelines.cache import digest_of

    A, B = (bases[adapter_name].to(torch.float32 if dtype is None else dtype) for bases in _bases(model, adapter_name))
    return digest_of({"A": A, "B": B})


METHOD = Randlora
