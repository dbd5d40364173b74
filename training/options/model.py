"""Options of the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.built_in import BUILT_IN, recorded_name
from pipelines.errors import InputError
from pipelines.subject.prediction import Prediction, check_combination, prediction_of


@dataclass
class ModelOptions:
    """The base model, its precision and its noise schedule."""

    pretrained_model_name_or_path: str = field(
        default=BUILT_IN,
        metadata={
            "help": f"SDXL base model: a hub name, a folder or a .safetensors file. Default: the built-in model, {BUILT_IN}."
        },
    )
    pretrained_vae_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder of another autoencoder, such as one made for fp16."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a base model with a hub name."})
    variant: str | None = field(default=None, metadata={"help": "Variant of the model's files, such as fp16."})
    single_file_config: str | None = field(
        default=None,
        metadata={
            "help": "For a base model in one file: hub name or folder of a model with the same configuration and tokenizers. "
            "Default: SDXL on the hub."
        },
    )
    quantize: Literal["nf4"] | None = field(
        default=None,
        metadata={
            "help": "nf4 keeps the linear layers of the UNet and both text encoders in 4 bits per parameter, as QLoRA does: with "
            "double quantisation, on GPUs products in bfloat16 and a paged AdamW (pip install bitsandbytes)."
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Precision of the frozen weights. Default: that of the accelerate configuration."}
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = field(
        default=None,
        metadata={"help": "What the base model predicts. Default: as in the model's files."},
    )
    rescale_betas_zero_snr: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Whether the base model was trained with zero terminal SNR, where the last noise level has no signal. "
            "Default: as in the model's files.",
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )

    _argument_group_name = "model"

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise InputError("pretrained_model_name_or_path must be a hub name or a folder, got an empty text.")
        self.pretrained_model_name_or_path = recorded_name(self.pretrained_model_name_or_path)
        check_combination(self.prediction_type, self.rescale_betas_zero_snr)

    def prediction(self) -> Prediction:
        """The prediction type and terminal SNR, by these options or else by the model's file."""
        return prediction_of(self.pretrained_model_name_or_path, self.prediction_type, self.rescale_betas_zero_snr)

    @property
    def source(self) -> dict[str, str | bool | None]:
        """The arguments of `load_base_model` besides the name."""
        return {
            "variant": self.variant,
            "revision": self.revision,
            "vae": self.pretrained_vae_model_name_or_path,
            "single_file_config": self.single_file_config,
            "quantize": self.quantize,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
        }
