"""NoRA adapters for PEFT and diffusers; importing this package makes PEFT know `NoraConfig`."""

from .calibration import ActivationStatistics, calibrate
from .config import NoraConfig, NoraPeftType
from .decomposition import awsvd
from .initialization import initialize_nora_weights
from .layer import NoraLayer
from .model import NoraModel
from .registration import register

__all__ = [
    "ActivationStatistics",
    "NoraConfig",
    "NoraLayer",
    "NoraModel",
    "NoraPeftType",
    "awsvd",
    "calibrate",
    "initialize_nora_weights",
]

register()
