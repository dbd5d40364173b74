"""VeRA: h = W x + diag(b) B diag(d) A x,  with random A and B that all layers share, by PEFT  [Kopiczko et al. 2024]."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.adapter_method import AdapterMethod, Probe, TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.lora_conversion import add_as_lora
from pipelines.native_files import FULL, METHOD_KEY, NativeFiles, read_native, write_native
from pipelines.option_checks import at_least
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig, VeraConfig
    from peft.tuners.vera import VeraLayer, VeraModel

    from nora_vision.factors import Factors

# Metadata keys: the digest and the sizes of A and B, which are not in the file.
PROJECTIONS, SIZES = "vera_projections_sha256", "vera_largest_in_and_out"
LARGEST_KEY = 2**31
LAMBDA_B, LAMBDA_D = "vera_lambda_b", "vera_lambda_d"


@dataclass
class VeraOptions:
    """Options of VeRA."""

    rank: int | None = option(None, "rank of the shared random matrices", **{"few-shot": "vera_rank"})
    dropout: float = option(0.0, "dropout probability within the adapter")
    d_initial: float = option(0.1, "initial value of the vector d", "VeRA d_initial (initial value of the vector d)")

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.d_initial == 0:
            raise InputError("d_initial must not be 0: no parameter would get a gradient. PEFT's default is 0.1.")


class Vera(AdapterMethod):
    """VeRA. A and B are generated from a PRNG key, so that a file holds only the vectors b and d and a digest of A and B."""

    name = "vera"
    title = "VeRA"
    reference = "Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation"
    parameters = "m + rank"
    Options = VeraOptions
    adapts_convolutions = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's rank for vision; vectors need higher learning rates than matrices."""
        rank = {"rank": 64 if built_in else 256}
        return TaskDefaults(3e-3 if task == "subject" else 1e-3, rank)

    def config(self, target_modules: list[str], exclude_modules: str | None = None) -> PeftConfig:
        """PEFT's configuration."""
        from peft import VeraConfig

        options = self.options
        with warnings.catch_warnings():
            # PEFT warns that other machines may generate other A and B; their digest is checked on loading.
            warnings.simplefilter("ignore")
            config = VeraConfig(
                r=options.rank,
                vera_dropout=options.dropout,
                d_initial=options.d_initial,
                target_modules=target_modules,
                save_projection=False,
            )
        # VeraConfig has no such field, but PEFT reads it.
        config.exclude_modules = exclude_modules
        return config

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter with PEFT's tuner, which holds the shared A and B; `add_adapter` does not support that."""
        try:
            scalable_model()(model, config, adapter_name)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{error} VeRA adapts Linear layers only, got {sorted(config.target_modules)}.") from error
        # A VeraConfig cannot save `exclude_modules`, so the targets are listed by name.
        config.target_modules, config.exclude_modules = set(vera_layers(model)), None
        model._hf_peft_config_loaded = True

    def start(self, model: nn.Module, probe: Probe, adapter_name: str) -> None:
        """Generate A and B from a key that is sampled from the probe's generator."""
        from diffusers.training_utils import cast_training_params

        cast_training_params(model, dtype=torch.float32)
        config = model.peft_config[adapter_name]
        config.projection_prng_key = int(torch.randint(LARGEST_KEY, (), generator=probe.generator))
        shared = shared_projections(list(vera_layers(model).values()), adapter_name)
        for name, values in random_projections(config, shared["A"].shape[1], shared["B"].shape[0]).items():
            shared[name].copy_(values)

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's two files to `full`, with the digest of A and B in the header."""
        from peft import get_peft_model_state_dict

        from nora_vision.calibration import base_name
        from nora_vision.saving import PEFT_PREFIX
        from pipelines.cache import digest_of

        for name, model in components.items():
            config, layers = model.peft_config[adapter_name], list(vera_layers(model).values())
            shared = shared_projections(layers, adapter_name)
            state = get_peft_model_state_dict(model, adapter_name=adapter_name)
            tensors = {f"{PEFT_PREFIX}{base_name(key)}": value for key, value in state.items()}
            metadata = {METHOD_KEY: cls.name, PROJECTIONS: digest_of(shared), SIZES: sizes_of(shared)}
            write_native(folder / FULL / name, config, tensors, metadata)

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's adapter as the plain LoRA that equals it.

        Raises:
            InputError: the adapter does not fit the model.
            AdapterFileError: a file was changed after it was saved, or the key gives other A and B here.
        """
        for name, model in components.items():
            factors = factors_in(read_native(folder / name), model, folder / name)
            add_as_lora(model, factors, adapter_name, folder / name)


def vera_layers(model: nn.Module) -> dict[str, VeraLayer]:
    """The VeRA layers of `model` by name."""
    from peft.tuners.vera import VeraLayer

    return {name: layer for name, layer in tuner_layers(model).items() if isinstance(layer, VeraLayer)}


def shared_projections(layers: Sequence[VeraLayer], adapter_name: str) -> dict[str, torch.Tensor]:
    """A (r, largest in) and B (largest out, r), which all layers share."""
    return {"A": layers[0].vera_A[adapter_name], "B": layers[0].vera_B[adapter_name]}


def random_projections(config: VeraConfig, largest_in: int, largest_out: int) -> dict[str, torch.Tensor]:
    """A (r, largest in) and B (largest out, r) from the configuration's key, as PEFT generates them."""
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(config.projection_prng_key)
    return {"A": _kaiming_init((config.r, largest_in), generator), "B": _kaiming_init((largest_out, config.r), generator)}


def sizes_of(shared: Mapping[str, torch.Tensor]) -> str:
    """The largest in_features and out_features of the adapted layers, by A (r, largest in) and B (largest out, r)."""
    return f"{shared['A'].shape[1]} and {shared['B'].shape[0]}"


def factors_in(files: NativeFiles, model: nn.Module, source: Path) -> dict[str, Factors]:
    """The factors of each layer's weight change: up = diag(b) B (out, r), down = diag(d) A (r, in).

    Raises: InputError for a layer that the model lacks; AdapterFileError if the key gives other A and B here.
    """
    from nora_vision.calibration import base_name
    from nora_vision.factors import Factors

    b, d = (vectors_in(files.tensors, part) for part in (LAMBDA_B, LAMBDA_D))
    inputs = {base_name(name): module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := sorted(b.keys() - inputs.keys()):
        raise InputError(
            f"{source} does not fit this model, which has no layer {absent[0]!r}. Load it onto the model that it was trained on."
        )
    shared = random_projections(files.config, max(inputs[name] for name in b), max(map(len, b.values())))
    check_projections(shared, files, source)
    return {
        name: Factors(b[name][:, None] * shared["B"][: len(b[name])], d[name][:, None] * shared["A"][:, : inputs[name]])
        for name in b
    }


def vectors_in(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The vectors called `part` by layer name: d (r,) or b (out_features,)."""
    from nora_vision.saving import PEFT_PREFIX

    ending = f".{part}"
    return {
        name.removeprefix(PEFT_PREFIX).removesuffix(ending): value for name, value in tensors.items() if name.endswith(ending)
    }


def check_projections(shared: Mapping[str, torch.Tensor], files: NativeFiles, source: Path) -> None:
    """Check A (r, largest in) and B (largest out, r) against the metadata of `files`.

    Raises: InputError if their sizes differ; AdapterFileError if their values differ.
    """
    from nora_vision.files import AdapterFileError
    from pipelines.cache import digest_of

    if sizes_of(shared) != files.metadata.get(SIZES):
        raise InputError(
            f"{source} does not fit this model: the largest in_features and out_features of the adapted layers were "
            f"{files.metadata.get(SIZES)}, and are {sizes_of(shared)} here. Load it onto the model that it was trained on."
        )
    if digest_of(shared) != files.metadata.get(PROJECTIONS):
        raise AdapterFileError(
            f"{source}: the key {files.config.projection_prng_key} gives other shared random matrices here than where the "
            "adapter was saved. Use the file exported for diffusers, which contains the full weight change."
        )


class Scalable:
    """A mixin that adds a scale, which diffusers sets, to PEFT's VeRA layer; it must precede that layer in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale: dict[str, float] = {}

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Scale the adapter's change by `scale`, 1 as trained."""
        self.scale[adapter_name] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale`."""
        for name in self.active_adapters:
            self.scale[name] = scale * self.scale.get(name, 1.0)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without `scale`, set the scale to 1."""
        for name in self.active_adapters:
            self.scale[name] = 1.0 if scale is None else self.scale.get(name, 1.0) / scale

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The scaled weight change, (out_features, in_features)."""
        return self.scale.get(adapter, 1.0) * super().get_delta_weight(adapter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """h = W x + scale diag(b) B diag(d) A x;  x: (..., in_features), h: (..., out_features)."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.vera_lambda_d:
                d, b = self.vera_lambda_d[name], self.scale.get(name, 1.0) * self.vera_lambda_b[name]
                A, B = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
                inputs = self.vera_dropout[name](self._cast_input_dtype(x, d.dtype))
                result = result + (b * F.linear(d * F.linear(inputs, A.to(d)), B.to(d))).to(result.dtype)
        return result


@cache
def scalable_model() -> type[VeraModel]:
    """PEFT's tuner with layers that have a scale; it also registers them with `low_rank_factors`.

    The classes are defined on the first call: their bases take seconds to import, and `--help` of every command reads this file.
    """
    from peft.tuners.vera import Linear as VeraLinear
    from peft.tuners.vera import VeraLayer, VeraModel

    from nora_vision.factors import low_rank_factors

    low_rank_factors.register(VeraLayer, vera_factors)

    class ScalableLinear(Scalable, VeraLinear):
        """PEFT's layer, with a scale."""

    class ScalableModel(VeraModel):
        """PEFT's tuner, with layers that can be scaled."""

        @staticmethod
        def _create_new_module(
            vera_config: VeraConfig, vera_A: Any, vera_B: Any, adapter_name: str, target: nn.Module, **kwargs: Any
        ):
            # Raises an error for other than Linear layers.
            VeraModel._create_new_module(vera_config, vera_A, vera_B, adapter_name, target, **kwargs)
            return ScalableLinear(target, vera_A, vera_B, adapter_name, config=vera_config, **kwargs)

    return ScalableModel


def vera_factors(layer: VeraLayer, adapter_name: str) -> Factors | None:
    """The weight change as up = diag(b) B (out_features, r) and down = diag(d) A (r, in_features)."""
    from nora_vision.factors import Factors

    if adapter_name not in layer.vera_lambda_b:
        return None
    b, d = layer.vera_lambda_b[adapter_name].detach().float(), layer.vera_lambda_d[adapter_name].detach().float()
    A, B = layer.vera_A[adapter_name][:, : layer.in_features], layer.vera_B[adapter_name][: layer.out_features]
    return Factors(b[:, None] * B.to(b), d[:, None] * A.to(d))


METHOD = Vera
