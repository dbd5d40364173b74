"""FourierFT: h = W x + s Re(F^-1(E)) x,  E with c trained entries at random places, by PEFT  [Gao et al. 2024]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_method import TaskDefaults, option, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.option_checks import above_zero, at_least
from pipelines.peft_method import LARGEST_SEED, PeftMethod
from pipelines.run_options import Task

if TYPE_CHECKING:
    from peft import PeftConfig

# Metadata keys. Earlier versions wrote no digest of the places.
SIZES, INDICES = "fourierft_sizes_sha256", "fourierft_places_sha256"


@dataclass
class FourierftOptions:
    """Options of FourierFT."""

    n_frequency: int | None = option(None, "number of trained entries of a layer's spectrum", "Frequencies")
    scaling: float = option(300.0, "factor s on the weight change", "Scaling")

    def __post_init__(self) -> None:
        at_least(self, 1, "n_frequency")
        above_zero(self, "scaling")


class Fourierft(PeftMethod):
    """FourierFT. The places are sampled from a seed in the file; the spectrum starts at zero."""

    name = "fourierft"
    title = "FourierFT"
    reference = "Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform"
    parameters = "n_frequency"
    Options = FourierftOptions
    config_class = "FourierFTConfig"
    adapts_quantized_layers = True
    # PEFT's default starts with a random spectrum.
    settings: ClassVar = {"init_weights": True}
    adapts_convolutions = False
    samples_start = False

    @classmethod
    def defaults(cls, task: Task, built_in: bool) -> TaskDefaults:
        """The paper's number and scaling for ViT; the built-in models are narrower."""
        return TaskDefaults(1e-2, {"n_frequency": 500 if built_in else 3000})

    def misfit_of_size(self, m: int, n: int) -> str | None:
        """The spectrum has m n entries."""
        count = self.options.n_frequency
        return None if count <= m * n else f"n_frequency must be at most {m * n}, its number of weights, got {count}."

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter, with places that depend on `generator`."""
        config.random_loc_seed = int(torch.randint(LARGEST_SEED, (), generator=generator))
        super().attach(model, config, adapter_name, generator)

    @classmethod
    def file_metadata(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """Digests of the sizes of the layers, which the number of frequencies does not show, and of the places."""
        return _digests(model, adapter_name)

    @classmethod
    def check_loaded(cls, model: nn.Module, adapter_name: str, metadata: Mapping[str, str], source: Path) -> None:
        """Compare the sizes of the layers and the places.

        Raises: InputError if the sizes differ or the file does not say them; AdapterFileError if the places differ.
        """
        from nora_vision.files import AdapterFileError

        expected = _digests(model, adapter_name)
        if SIZES not in metadata:
            raise InputError(
                f"{source} does not say for which sizes of layers it was trained, which FourierFT's tensors do not show. Load it "
                "with PEFT, or train it again here."
            )
        if metadata[SIZES] != expected[SIZES]:
            raise InputError(
                f"{source} does not fit this model: its layers have other sizes. Load it onto the model that it was trained on."
            )
        if metadata.get(INDICES, expected[INDICES]) != expected[INDICES]:
            raise AdapterFileError(
                f"{source}: the seed {model.peft_config[adapter_name].random_loc_seed} gives other places here than where the "
                "adapter was saved. Use the file exported for diffusers."
            )


def _digests(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The digests by their keys: of (out, in) of each layer, and of the places (2, c) in its spectrum."""
    from nora_vision.calibration import base_name
    from pipelines.cache import digest_of

    layers = {base_name(name): layer for name, layer in tuner_layers(model).items()}
    layers = {name: each for name, each in layers.items() if adapter_name in getattr(each, "fourierft_spectrum", ())}
    sizes = {name: torch.tensor([layer.out_features, layer.in_features]) for name, layer in layers.items()}
    return {SIZES: digest_of(sizes), INDICES: digest_of({name: layer.indices[adapter_name] for name, layer in layers.items()})}


METHOD = Fourierft
