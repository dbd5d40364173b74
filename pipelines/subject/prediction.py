"""The prediction type and the terminal SNR of a model, from its file or from the user.

Single-file checkpoints mark them by tensors that ComfyUI and A1111 read, `v_pred`, `ztsnr`, and `edm_vpred.sigma_max` for EDM's
noise levels, or by `modelspec.prediction_type` in the header. diffusers reads none of these.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError
from pipelines.lazy_modules import safetensors

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

EPSILON, V_PREDICTION = "epsilon", "v_prediction"
V_PRED_KEY, ZTSNR_KEY, SIGMA_MAX_KEY, SIGMA_MIN_KEY = "v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min"
KEYS = (V_PRED_KEY, ZTSNR_KEY, SIGMA_MAX_KEY, SIGMA_MIN_KEY)
METADATA_KEY = "modelspec.prediction_type"
# The spellings of modelspec, sd-scripts and model editors.
SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), EPSILON),
    **dict.fromkeys(("v", "v_prediction", "vprediction", "v_pred", "vpred", "velocity", "v_parameterization"), V_PREDICTION),
}
EDM_SIGMA_MIN = 0.002
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Changes to the configuration of a model's scheduler; None for no change.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        rescale_betas_zero_snr: whether the last noise level has no signal at all  [Lin et al. 2023].
        edm_sigmas: smallest and largest noise level of a v-prediction model with EDM's noise levels, such as CosXL.
    """

    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    edm_sigmas: tuple[float, float] | None = None

    @property
    def scheduler_class(self) -> str | None:
        """The name of the diffusers scheduler that replaces the model's own; None to keep it."""
        return None if self.edm_sigmas is None else "EDMEulerScheduler"

    def scheduler_arguments(self) -> dict[str, Any]:
        """The changed arguments of the scheduler; spacing is "trailing", so that sampling starts at the last noise level."""
        arguments: dict[str, Any] = {}
        if self.edm_sigmas is not None:
            arguments = {"sigma_min": self.edm_sigmas[0], "sigma_max": self.edm_sigmas[1], "sigma_data": 1.0}
            arguments |= {"sigma_schedule": "exponential", "prediction_type": V_PREDICTION}
        if self.prediction_type is not None:
            arguments["prediction_type"] = self.prediction_type
        if self.rescale_betas_zero_snr is not None:
            arguments["rescale_betas_zero_snr"] = self.rescale_betas_zero_snr
        if self.rescale_betas_zero_snr:
            arguments["timestep_spacing"] = "trailing"
        return arguments

    def apply(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """`scheduler` with these changes.

        Raises: InputError for zero terminal SNR with a scheduler that does not support it, or a model that predicts epsilon.
        """
        arguments = self.scheduler_arguments()
        if self.rescale_betas_zero_snr and (self.edm_sigmas or not _can_rescale(scheduler)):
            name = self.scheduler_class or type(scheduler).__name__
            raise InputError(
                f"rescale_betas_zero_snr is not supported by this model's {name}. Remove it, or use a model folder with a "
                "DDIMScheduler or EulerDiscreteScheduler."
            )
        if self.edm_sigmas is not None:
            arguments.pop("rescale_betas_zero_snr", None)
            # Imported here, as the options of a command need this file, and diffusers takes seconds to import.
            from diffusers import EDMEulerScheduler

            scheduler = EDMEulerScheduler(**arguments)
        elif arguments:
            scheduler = type(scheduler).from_config(scheduler.config, **arguments)
        check_terminal_snr(scheduler)
        return scheduler


def _can_rescale(scheduler: ConfigMixin) -> bool:
    return "rescale_betas_zero_snr" in scheduler.config


def check_terminal_snr(scheduler: SchedulerMixin) -> None:
    """Check that a scheduler does not combine epsilon with zero terminal SNR; see `check_combination`."""
    config = scheduler.config
    check_combination(config.prediction_type, config.get("rescale_betas_zero_snr"))


def check_combination(prediction_type: str | None, rescale_betas_zero_snr: bool | None) -> None:
    """Check that epsilon is not combined with zero terminal SNR, where the noise says nothing about the image.

    Raises: InputError if it is.
    """
    if prediction_type == EPSILON and rescale_betas_zero_snr:
        raise InputError(
            "rescale_betas_zero_snr needs a model that predicts v: at the last noise level the input is noise alone, and "
            "prediction_type 'epsilon' would divide by a signal of 0. Give --prediction_type v_prediction, or "
            "--rescale_betas_zero_snr False."
        )


def prediction_of(
    name_or_path: str, prediction_type: str | None = None, rescale_betas_zero_snr: bool | None = None
) -> Prediction:
    """The given settings, or else those in the model's file if it is a single file.

    Raises: InputError for an unknown prediction type in the file, unless one is given.
    """
    path = Path(name_or_path)
    stated = read_prediction(path, prediction_type is None) if path.is_file() else Prediction()
    return Prediction(
        stated.prediction_type if prediction_type is None else prediction_type,
        stated.rescale_betas_zero_snr if rescale_betas_zero_snr is None else rescale_betas_zero_snr,
        stated.edm_sigmas,
    )


def read_prediction(path: Path, strict: bool = True) -> Prediction:
    """The settings in a .safetensors file, by names of tensors or else by its header.

    Args:
        strict: whether an unknown prediction type in the header is an error.
    Raises: InputError for an unknown prediction type, if `strict`.
    """
    with safetensors.safe_open(path, "pt") as file:
        # Some files put them under the prefix of the UNet.
        tensors = file.keys()
        names = {next((key for key in KEYS if name.endswith(f".{key}")), name): name for name in tensors}
        metadata, sigmas = file.metadata() or {}, _edm_sigmas(file, names)
    by_name = V_PREDICTION if V_PRED_KEY in names or sigmas is not None else None
    in_header = _in_header(metadata.get(METADATA_KEY), path, strict and by_name is None)
    if by_name is not None:
        _warn_of_header(path, in_header)
    return Prediction(by_name or in_header, True if ZTSNR_KEY in names else None, sigmas)


def _warn_of_header(path: Path, in_header: str | None) -> None:
    """Warn if the header contradicts the names of the tensors, which say v-prediction."""
    if in_header not in (None, V_PREDICTION):
        logger.warning(
            f"{str(path)!r} has the tensor {V_PRED_KEY!r}, but its header says {METADATA_KEY} {in_header!r}. It is loaded as "
            f"{V_PREDICTION}; --prediction_type overrides this."
        )


def _edm_sigmas(file: safetensors.safe_open, names: Mapping[str, str]) -> tuple[float, float] | None:
    """The smallest and the largest noise level in the file's tensors; None if there are none."""
    if SIGMA_MAX_KEY not in names:
        return None
    smallest = file.get_tensor(names[SIGMA_MIN_KEY]).item() if SIGMA_MIN_KEY in names else EDM_SIGMA_MIN
    return float(smallest), float(file.get_tensor(names[SIGMA_MAX_KEY]).item())


def _in_header(value: str | None, path: Path, strict: bool) -> str | None:
    if value is None or not value.strip():
        return None
    prediction_type = SPELLINGS.get(value.strip().lower().replace("-", "_").replace(" ", "_"))
    if prediction_type is None and strict:
        raise InputError(
            f"{METADATA_KEY} in the header of {str(path)!r} must be epsilon or v, got {value!r:.60}. Give --prediction_type."
        )
    return prediction_type
