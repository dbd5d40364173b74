"""A CLIP model whose encoders are stored in 4 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipelines.cache import module_digest
from pipelines.clip import Clip
from pipelines.clip_attention import separate
from pipelines.errors import InputError
from pipelines.fewshot.adapters import encoder
from pipelines.fewshot.target_layers import IMAGE, TEXT
from pipelines.quantization import compute_dtype, quantize_linear_layers


def quantized(clip: Clip, kind: str, unquantized: Path | None = None) -> Clip:
    """`clip`, changed in place: the linear layers of both encoders in 4 bits, attention projections included.

    Its `base_sha256` remains that of the weights before.

    Args:
        kind: "nf4".
        unquantized: a folder for the weights before quantisation, with a folder for each encoder.
    Raises: InputError if an attention cannot be split into projections.
    """
    digest, dtype = module_digest(clip.model), compute_dtype(clip.dtype, clip.device)
    try:
        separate(clip.model)
    except ValueError as error:
        raise InputError(f"{clip.name} cannot be quantised: {error}") from error
    errors = {}
    for name in (IMAGE, TEXT):
        folder = None if unquantized is None else unquantized / name
        errors[name] = quantize_linear_layers(encoder(clip, name), kind, dtype, folder)
    clip.model.eval().requires_grad_(False)
    return replace(clip, base_sha256=digest, quantization_errors=errors)
