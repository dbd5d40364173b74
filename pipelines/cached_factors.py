"""The factors that an initialisation computes from data, cached beside the activation statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nora_vision.factors import Factors

# Metadata key: a hash of what the factors were computed from.
ORIGIN = "factors_origin"


def factors_from(
    cache: Path, method: str, options: Any, weights: Mapping[str, torch.Tensor], compute: Callable[[], dict[str, Factors]]
) -> dict[str, Factors]:
    """The factors of each layer: from the method's own file beside `cache`, or else from `compute`, which are written to it.

    A file of other options or weights is replaced.

    Args:
        cache: the file of the probe, see `Probe`; each method has its own beside it.
        options: the method's options, a dataclass, which determine the factors together with the data.
        weights: of the adapted layers by name, of any shape.
        compute: the factors by layer name: up (out, k) and down (k, in).
    Raises: AdapterFileError if the file is damaged.
    """
    from nora_vision.factors import Factors
    from nora_vision.files import read_header, read_tensors, write_tensors

    file = cache.with_name(f"{cache.stem}-{method}.safetensors")
    origin = _origin(options, weights)
    if file.exists() and read_header(file).metadata.get(ORIGIN) == origin:
        tensors = read_tensors(file)
        names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
        return {name: Factors(tensors[f"{name}.up"], tensors[f"{name}.down"]) for name in names}
    factors = compute()
    tensors = {f"{name}.{part}": getattr(pair, part) for name, pair in factors.items() for part in ("up", "down")}
    write_tensors(file, tensors, {ORIGIN: origin}, digest=True)
    return factors


def _origin(options: Any, weights: Mapping[str, torch.Tensor]) -> str:
    from nora_vision.calibration import fingerprint

    values = [dataclasses.asdict(options), {name: fingerprint(weight) for name, weight in weights.items()}]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
