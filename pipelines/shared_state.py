"""The base class of methods whose layers share state: a bank of vectors, or random projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipelines.adapter_checks import PEFT_ERRORS, check_tensors
from pipelines.adapter_method import ADAPTER_NAME, tuner_layers
from pipelines.errors import InputError
from pipelines.lazy_modules import nn, torch
from pipelines.lora_conversion import add_as_lora
from pipelines.native_files import FULL, METHOD_KEY, WEIGHTS, NativeFiles, read_native, write_native
from pipelines.peft_method import LARGEST_SEED, PeftMethod, skeleton_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from nora_vision.factors import Factors

# Metadata keys: the digest and the sizes of what is generated from a seed and not in the file.
DIGEST, SIZES = "generated_sha256", "generated_sizes"


class SharedStateMethod(PeftMethod):
    """A tuner of PEFT whose layers share state, which only the tuner's own class injects.

    The weight change has low rank: it is exported exactly as plain LoRA and loaded as that. A file does not contain what is
    generated from a seed, but its digest, so that another machine's other random numbers are an error.
    """

    is_low_rank = True
    adapts_convolutions = False
    # FSDP would shard what is shared as a part of the first layer.
    can_be_sharded = False
    # Attributes of the layers that PEFT saves once, as the tuner's.
    shared: ClassVar[tuple[str, ...]] = ()
    # The field of the configuration for the seed of what is generated.
    seed_field: ClassVar[str | None] = None
    digest_key: ClassVar[str] = DIGEST
    sizes_key: ClassVar[str] = SIZES
    # What `sizes_of` describes, in the plural.
    sized: ClassVar[str] = "the adapted layers"

    # Defined by subclasses

    @staticmethod
    def factors_of(layer: BaseTunerLayer, adapter_name: str) -> Factors:
        """The exact low-rank factors of the layer's weight change at scale 1."""
        raise NotImplementedError

    @classmethod
    def generated(cls, layers: Mapping[str, BaseTunerLayer], adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of `layers`, by name, that are generated from the configuration's seed and not saved."""
        return {}

    @classmethod
    def sizes_of(cls, generated: Mapping[str, torch.Tensor]) -> str:
        """What differs in `generated` for a model with other layers."""
        return f"{len(generated)} matrices of {sum(tensor.numel() for tensor in generated.values())} entries"

    @classmethod
    def complete(cls, layers: Sequence[BaseTunerLayer], config: PeftConfig, adapter_name: str) -> None:
        """Correct what PEFT sets up in `layers`, in training and on loading."""

    # Adding an adapter

    def attach(self, model: nn.Module, config: PeftConfig, adapter_name: str, generator: torch.Generator) -> None:
        """Add the adapter; the seed of what is generated comes from `generator` too."""
        if self.seed_field is not None:
            setattr(config, self.seed_field, int(torch.randint(LARGEST_SEED, (), generator=generator)))
        super().attach(model, config, adapter_name, generator)
        self.complete(list(self.layers_of(model).values()), config, adapter_name)

    @classmethod
    def inject(cls, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        """Add the adapter with PEFT's tuner, which `add_adapter` does not support."""
        cls._tuner()(model, config, adapter_name)
        model._hf_peft_config_loaded = True

    @classmethod
    def _tuner(cls) -> type[BaseTuner]:
        """PEFT's tuner, after registering the factors of its layers."""
        import peft
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        from nora_vision.factors import has_adapter, low_rank_factors

        def factors(layer: BaseTunerLayer, adapter_name: str) -> Factors | None:
            """None if the layer does not have the adapter."""
            with torch.no_grad():
                return cls.factors_of(layer, adapter_name) if has_adapter(layer, adapter_name) else None

        tuner = PEFT_TYPE_TO_TUNER_MAPPING[getattr(peft, cls.config_class)().peft_type]
        low_rank_factors.register(tuner.tuner_layer_cls, factors)
        return tuner

    @classmethod
    def layers_of(cls, model: nn.Module) -> dict[str, BaseTunerLayer]:
        """The method's layers of `model` by name, without those of other methods."""
        from nora_vision.calibration import base_name

        kind = cls._tuner().tuner_layer_cls
        return {base_name(name): layer for name, layer in tuner_layers(model).items() if isinstance(layer, kind)}

    # Files

    @classmethod
    def save(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Write PEFT's two files to `full`, with the digest of what is generated in the header."""
        from peft import get_peft_model_state_dict

        from nora_vision.calibration import base_name

        for name, model in components.items():
            layers = cls.layers_of(model)
            state = get_peft_model_state_dict(cls._as_peft_model(model), adapter_name=adapter_name)
            tensors = {base_name(key): value for key, value in state.items()}
            metadata = {METHOD_KEY: cls.name, **cls.metadata(cls.generated(layers, adapter_name))}
            write_native(folder / FULL / name, model.peft_config[adapter_name], tensors, metadata)

    @classmethod
    def _as_peft_model(cls, model: nn.Module) -> nn.Module:
        """A module with `model` and what its layers share in the places where a PeftModel has them."""
        wrapper = nn.Module()
        wrapper.base_model = nn.Module()
        wrapper.base_model.model, wrapper.peft_config = model, model.peft_config
        layer = next(iter(cls.layers_of(model).values()))
        for part in cls.shared:
            setattr(wrapper.base_model, part, getattr(layer, part))
        return wrapper

    @classmethod
    def load(cls, components: Mapping[str, nn.Module], folder: Path, adapter_name: str) -> None:
        """Load each component's adapter as the plain LoRA that equals it.

        Raises:
            InputError: the adapter does not fit the model.
            AdapterFileError: a file was changed after it was saved, or its seed gives other numbers here.
        """
        for name, model in components.items():
            factors = cls._factors_in(read_native(folder / name), model, folder / name)
            add_as_lora(model, factors, adapter_name, folder / name)

    @classmethod
    def _factors_in(cls, files: NativeFiles, model: nn.Module, source: Path) -> dict[str, Factors]:
        """The factors of each layer's weight change, computed by PEFT's tuner on a copy of the model's layers."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        from nora_vision.factors import low_rank_factors

        cls._tuner()
        refusal = f"{source / WEIGHTS} does not fit this model: {{}} Load it onto the model that it was trained on."
        try:
            adapted: PeftModel = get_peft_model(skeleton_of(model), files.config, ADAPTER_NAME).eval()
            check_tensors(files.tensors, get_peft_model_state_dict(adapted))
            set_peft_model_state_dict(adapted, dict(files.tensors), ADAPTER_NAME)
        except (RuntimeError, *PEFT_ERRORS) as error:
            raise InputError(refusal.format(error)) from error
        layers = cls.layers_of(adapted.base_model.model)
        cls.complete(list(layers.values()), files.config, ADAPTER_NAME)
        cls.check_generated(cls.generated(layers, ADAPTER_NAME), files, refusal, source)
        return {name: low_rank_factors(layer, ADAPTER_NAME) for name, layer in layers.items()}

    @classmethod
    def metadata(cls, generated: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The digest and the sizes of tensors that are not saved; empty if there are none."""
        from pipelines.cache import digest_of

        return {cls.digest_key: digest_of(generated), cls.sizes_key: cls.sizes_of(generated)} if generated else {}

    @classmethod
    def check_generated(cls, generated: Mapping[str, torch.Tensor], files: NativeFiles, refusal: str, source: Path) -> None:
        """Compare the tensors that were generated here with the metadata of `files`.

        Raises: InputError if their sizes differ; AdapterFileError if their values differ.
        """
        from nora_vision.files import AdapterFileError

        expected = cls.metadata(generated)
        differing = [key for key, value in expected.items() if files.metadata.get(key) != value]
        if cls.sizes_key in differing:
            was, now = files.metadata.get(cls.sizes_key), expected[cls.sizes_key]
            raise InputError(refusal.format(f"{cls.sized} were {was}, and are {now} here."))
        if differing:
            seed = getattr(files.config, cls.seed_field)
            raise AdapterFileError(
                f"{source}: the key {seed} gives other shared random matrices here than where the adapter was saved. Use "
                "the file exported for diffusers, which contains the full weight change."
            )
