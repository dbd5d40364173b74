"""NoRA adapters for PEFT and diffusers; importing this package makes PEFT know `NoraConfig`."""

from .config import NoraConfig, NoraPeftType
from .decomposition import awsvd
from .layer import NoraLayer
from .model import NoraModel
from .registration import register

__all__ = ["NoraConfig", "NoraLayer", "NoraModel", "NoraPeftType", "awsvd"]

register()
