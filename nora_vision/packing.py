"""The tensors of a compact file: one for each kind of tensor, over all layers in the order of their names.

Nothing is lost: trained factors that were rounded before (see `round_inner_factors`) take one or two bytes an entry, others four.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from math import prod

import torch

from .calibration import ActivationStatistics
from .compact import PROJECTIONS
from .files import DTYPES, AdapterFileError, TensorEntry, tensor_bytes
from .rounding import INT4_LIMIT, directions_of_int4, factors_of_int8, int4_directions, int8_factors
from .scales import recovered_steps, scale_of, steps_of

SCALE, PROBE = "nora_activation_scale", "nora_probe"
# The axis of the directions of outer factors, which are only in files of adapters whose outer factors are rounded to 4 bits.
OUTER_AXES = {"nora_A": 0, "nora_B": 1}
# After the name of a kind of factors in 8 or 4 bits: the value of one step, for each layer or direction.
STEP = ".step"
PACKED_DTYPES = DTYPES | {"I8": torch.int8, "U8": torch.uint8}
# Keys of the header's metadata: how activation scales are stored, and the digest of recomputed ones.
SCALES, SCALES_DIGEST = "nora_scales", "nora_scales_sha256"
STEPS, PARITY = "steps", "parity"
SCALE_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
COMPRESSION = 9

Shape = tuple[int, ...]
BIT_POSITIONS = torch.arange(7, -1, -1, dtype=torch.uint8)


def pack(tensors: Mapping[str, torch.Tensor], base_calibration: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The packed tensors, and metadata of the header.

    Args:
        tensors: by `<layer>.<kind>`; outer factors only if they are rounded to 4 bits.
        base_calibration: whether a reader can recompute the activation scales.
    """
    packed: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for kind, names in names_by_kind(tensors).items():
        parts = [tensors[name].detach().cpu() for name in names]
        if kind == SCALE:
            packed[kind], metadata = _pack_scales(parts, base_calibration)
        elif kind == PROBE:
            packed[kind] = torch.stack(parts)
        elif kind in OUTER_AXES:
            packed |= _pack_outer_factors(kind, parts)
        else:
            packed |= _pack_factors(kind, parts)
    return packed, metadata


def names_by_kind(names: Mapping[str, object]) -> dict[str, list[str]]:
    """The names `<layer>.<kind>` of each kind, in the order of the layers' names."""
    by_kind: dict[str, list[str]] = {}
    for layer, _, kind in sorted(name.rpartition(".") for name in names):
        by_kind.setdefault(kind, []).append(f"{layer}.{kind}")
    return by_kind


def packed_shapes(shapes: Mapping[str, Shape], stored: Mapping[str, TensorEntry]) -> dict[str, Shape]:
    """The shapes of the packed tensors of an adapter whose layers have tensors of `shapes`, by `<layer>.<kind>`.

    Args:
        stored: the entries of the file, which determine the dtype of factors and the size of the compressed scales.
    """
    expected: dict[str, Shape] = {}
    for kind, names in names_by_kind(shapes).items():
        entry = stored.get(kind)
        if kind == PROBE:
            expected[kind] = (len(names), 1 + PROJECTIONS)
        elif kind == SCALE:
            expected[kind] = entry.shape[:1] if entry is not None else (1,)
        else:
            expected |= _packed_factor_shapes(kind, [shapes[name] for name in names], entry)
    return expected


def _packed_factor_shapes(kind: str, shapes: Sequence[Shape], entry: TensorEntry | None) -> dict[str, Shape]:
    """The shapes of factors of `shapes` and of their steps."""
    total = sum(map(prod, shapes))
    if kind in OUTER_AXES:
        return {kind: ((total + 1) // 2,), kind + STEP: (sum(shape[OUTER_AXES[kind]] for shape in shapes),)}
    expected: dict[str, Shape] = {kind: (total,)}
    if entry is not None and entry.dtype == torch.int8:
        expected[kind + STEP] = (len(shapes),)
    return expected


def unpack(
    packed: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Shape],
    statistics: ActivationStatistics | None,
    where: str,
) -> dict[str, torch.Tensor]:
    """The tensors by `<layer>.<kind>`, which have `shapes`.

    Args:
        packed: of the shapes that `packed_shapes` returns.
        metadata: of the header.
        statistics: of the base calibration, if `needs_statistics`.
        where: the file, for messages.
    Raises: AdapterFileError naming the file if the scales are damaged or not those of `statistics`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for kind, names in names_by_kind(shapes).items():
        if kind == SCALE:
            tensors |= _unpack_scales(packed[kind], metadata, {name: shapes[name][0] for name in names}, statistics, where)
        elif kind == PROBE:
            tensors |= dict(zip(names, packed[kind], strict=True))
        elif kind in OUTER_AXES:
            tensors |= _unpack_outer_factors(kind, packed, {name: shapes[name] for name in names})
        else:
            steps = packed.get(kind + STEP, torch.ones(len(names)))
            parts = packed[kind].split([prod(shapes[name]) for name in names])
            for name, part, step in zip(names, parts, steps, strict=True):
                tensors[name] = factors_of_int8(part, step).reshape(shapes[name])
    return tensors


def needs_statistics(metadata: Mapping[str, str]) -> bool:
    """Whether the activation scales must be recomputed."""
    return metadata.get(SCALES) == PARITY


def _pack_factors(kind: str, parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors in the smallest dtype that is exact for all layers."""
    quantised = [int8_factors(part) for part in parts]
    values = torch.cat([part.flatten().float() for part in parts])
    if all(torch.equal(factors_of_int8(*both), part.float()) for both, part in zip(quantised, parts, strict=True)):
        integers, steps = zip(*quantised, strict=True)
        return {kind: torch.cat([part.flatten() for part in integers]), kind + STEP: torch.stack(steps)}
    half = values.half()
    return {kind: half if torch.equal(half.float(), values) else values}


def _pack_outer_factors(kind: str, parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Directions in 4 bits, two entries to a byte, the first in its lower half.

    Raises: AdapterFileError if they are not rounded to 4 bits.
    """
    axis = OUTER_AXES[kind]
    integers, steps = zip(*(int4_directions(part, axis) for part in parts), strict=True)
    for part, quantised, step in zip(parts, integers, steps, strict=True):
        if not torch.equal(directions_of_int4(quantised, step, axis).to(part.dtype), part):
            raise AdapterFileError(
                "The adapter is not saved as a compact file: outer_dtype is 'int4', but its outer factors are not rounded to 4 "
                "bits. Save the full file, or start it with initialize_nora_weights."
            )
    entries = torch.cat([part.flatten() for part in integers]) + INT4_LIMIT + 1
    low, high = torch.cat([entries, entries.new_zeros(len(entries) % 2)]).to(torch.uint8).view(-1, 2).unbind(dim=1)
    return {kind: low | (high << 4), kind + STEP: torch.cat(steps)}


def _unpack_outer_factors(kind: str, packed: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    axis, tensors = OUTER_AXES[kind], {}
    halves = torch.stack([packed[kind] & 15, packed[kind] >> 4], dim=1).flatten().to(torch.int8) - INT4_LIMIT - 1
    sizes = [prod(shape) for shape in shapes.values()]
    parts = halves[: sum(sizes)].split(sizes)
    steps = packed[kind + STEP].split([shape[axis] for shape in shapes.values()])
    for (name, shape), part, step in zip(shapes.items(), parts, steps, strict=True):
        tensors[name] = directions_of_int4(part.reshape(shape), step, axis)
    return tensors


def _pack_scales(parts: Sequence[torch.Tensor], base_calibration: bool) -> tuple[torch.Tensor, dict[str, str]]:
    """The compressed scales. Many layers have equal ones, such as query, key and value, which compression stores once."""
    coarse = [steps_of(part) for part in parts]
    if all(steps is not None for steps in coarse):
        steps = torch.cat(coarse)
        if base_calibration:
            return _compressed(_packed_bits(steps & 1)), {SCALES: PARITY, SCALES_DIGEST: _digest(steps)}
        return _compressed(tensor_bytes(steps)), {SCALES: STEPS}
    values = torch.cat(parts).float()
    stored = next(name for name, dtype in SCALE_DTYPES.items() if torch.equal(values.to(dtype).float(), values))
    return _compressed(tensor_bytes(values.to(SCALE_DTYPES[stored]))), {SCALES: stored}


def _packed_bits(bits: torch.Tensor) -> bytes:
    """Zeros and ones (n,) as bytes, the first bit of each byte being its highest."""
    padded = torch.cat([bits.to(torch.uint8), bits.new_zeros(-len(bits) % 8, dtype=torch.uint8)])
    return bytes(tensor_bytes((padded.view(-1, 8) << BIT_POSITIONS).sum(dim=1, dtype=torch.uint8)))


def _unpacked_bits(data: bytes, count: int) -> torch.Tensor:
    """The first `count` bits of what `_packed_bits` returned, (count,) uint8."""
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ((packed[:, None] >> BIT_POSITIONS) & 1).flatten()[:count]


def _unpack_scales(
    stream: torch.Tensor,
    metadata: Mapping[str, str],
    sizes: Mapping[str, int],
    statistics: ActivationStatistics | None,
    where: str,
) -> dict[str, torch.Tensor]:
    kind, count = metadata.get(SCALES, ""), sum(sizes.values())
    widths = {PARITY: 1, STEPS: 8} | {name: 8 * dtype.itemsize for name, dtype in SCALE_DTYPES.items()}
    if kind not in widths:
        raise AdapterFileError(f"{where}: {SCALES} must be one of {', '.join(widths)}, got {kind!r}.")
    data = _decompressed(stream, (count * widths[kind] + 7) // 8, where)
    if kind == PARITY:
        bits = _unpacked_bits(bytes(data), count)
        steps = _recovered(bits.split(list(sizes.values())), sizes, statistics, where)
        if _digest(steps) != metadata.get(SCALES_DIGEST):
            raise AdapterFileError(
                f"{where}: the activation scales that were recomputed must be those of the adapter, but are not. The base "
                "model or its text encoders have other weights or another precision than in the training, or this machine "
                "computes too differently. Load the base model of the training, or use the full adapter or its LoRA export."
            )
        values = scale_of(steps)
    elif kind == STEPS:
        values = scale_of(torch.frombuffer(data, dtype=torch.int8))
    else:
        values = torch.frombuffer(data, dtype=SCALE_DTYPES[kind]).float()
    return dict(zip(sizes, values.split(list(sizes.values())), strict=True))


def _recovered(
    parities: Sequence[torch.Tensor], sizes: Mapping[str, int], statistics: ActivationStatistics | None, where: str
) -> torch.Tensor:
    """The steps of all layers from their parity (in,) and the recomputed statistics."""
    parts = []
    for (name, size), parity in zip(sizes.items(), parities, strict=True):
        layer = name.removesuffix(f".{SCALE}")
        if statistics is None or layer not in statistics or statistics[layer].shape != (size,):
            raise AdapterFileError(
                f"{where}: its activation scales are not stored, and the base calibration given has none of {size} entries for "
                f"{layer!r}. Calibrate this model at all adapted layers, or use the full adapter or its LoRA export."
            )
        parts.append(recovered_steps(statistics[layer], parity))
    return torch.cat(parts)


def _compressed(data: bytes | memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, COMPRESSION)), dtype=torch.uint8)


def _decompressed(stream: torch.Tensor, size: int, where: str) -> bytearray:
    """Decompress `stream` to exactly `size` bytes."""
    # A limit, since a small stream may decompress to gigabytes.
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(tensor_bytes(stream), size + 1)
    except zlib.error as error:
        raise AdapterFileError(f"{where}: its activation scales are damaged: {error}. Copy or download it again.") from error
    if len(data) != size or not reader.eof or reader.unused_data:
        raise AdapterFileError(f"{where}: its activation scales must have {size} bytes for this model's layers, but have others.")
    return bytearray(data)


def _digest(steps: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(steps)).hexdigest()
