"""The components of an SDXL pipeline that can have adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def adapters_by_component(pipe: StableDiffusionXLPipeline) -> dict[str, list[str]]:
    """The names of the adapters on each component of the pipeline; none for absent components."""
    return {name: list(getattr(getattr(pipe, name, None), "peft_config", None) or {}) for name in COMPONENTS}


def adapted_components(pipe: StableDiffusionXLPipeline, adapter_name: str) -> dict[str, nn.Module]:
    """The components of the pipeline that have the adapter, by name.

    Raises: ValueError if there is none.
    """
    present = adapters_by_component(pipe)
    adapted = {name: getattr(pipe, name) for name, adapters in present.items() if adapter_name in adapters}
    if not adapted:
        raise ValueError(f"No component of the pipeline has an adapter {adapter_name!r}; its adapters are {present}.")
    return adapted
