"""NoRA adapters for PEFT and diffusers; importing this package makes PEFT know `NoraConfig`."""

from .base_calibration import sdxl_calibration
from .calibration import ActivationStatistics, calibrate
from .config import NoraConfig, NoraPeftType
from .decomposition import awsvd
from .export import export_lora
from .files import AdapterFileError
from .initialization import initialize_nora_weights
from .layer import NoraLayer
from .loading import load_adapter, load_nora
from .model import NoraModel
from .quantization import CheckpointWeights
from .registration import register
from .rounding import round_inner_factors
from .saving import save_adapter, save_nora

__all__ = [
    "ActivationStatistics",
    "AdapterFileError",
    "CheckpointWeights",
    "NoraConfig",
    "NoraLayer",
    "NoraModel",
    "NoraPeftType",
    "awsvd",
    "calibrate",
    "export_lora",
    "initialize_nora_weights",
    "load_adapter",
    "load_nora",
    "round_inner_factors",
    "save_adapter",
    "save_nora",
    "sdxl_calibration",
]

register()
