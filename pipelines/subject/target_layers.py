"""The layers of SDXL that an adapter changes by default."""

from __future__ import annotations

from pipelines.methods import method_named

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv1", "conv2"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def default_targets(method: str, built_in: bool) -> list[str]:
    """Name endings of the UNet's layers that `method` adapts by default.

    On the built-in model these are all layers that the method can adapt, as its highest resolution has no attention.
    """
    chosen = method_named(method)
    layers = chosen.defaults("subject", built_in).target_layers
    if layers is not None:
        return list(layers)
    return [*LINEAR, *(CONVOLUTIONS if chosen.adapts_convolutions else [])] if built_in else ATTENTION
