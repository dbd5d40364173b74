"""Calibration in groups of layers, for moments that do not fit into memory together: X^T X of SDXL's attention takes 8 GB."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration import ActivationStatistics, base_name, calibrate, unwrapped
from .layer import nora_layers
from .moments import empty_moments
from .weighting import MOMENTS

logger = logging.getLogger(__name__)
# Bytes of moments in memory at a time: all layers of the built-in models, about 80 attention layers of SDXL.
GROUP_BYTES = 2**30


class StoredMoments(Mapping[str, torch.Tensor]):
    """Moments by layer name, read from the files of their groups; those of one group are in memory.

    Args:
        files: the file of each layer's group.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._path: Path | None = None
        self._group: Mapping[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._path != self._files[name]:
            # Released first, so that two groups are never in memory.
            self._group = {}
            self._path = self._files[name]
            self._group = ActivationStatistics.load(self._path).moments
        return self._group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def calibrate_in_groups(
    model: nn.Module,
    run_model: Callable[[], Any],
    path: Path,
    *,
    weighting: str,
    group_bytes: int | None = None,
) -> ActivationStatistics:
    """As `calibrate`, in one pass for each group of layers. Moments of several groups are kept in files beside `path`.

    Args:
        model: with NoRA layers.
        path: `<stem>.safetensors`; groups are written to `<stem>-<number>.safetensors`, and those that exist are not calibrated
            again.
        group_bytes: bytes of the moments of one group, which has at least one layer; by default `GROUP_BYTES`.
    Raises: ValueError as `calibrate`.
    """
    group_bytes = GROUP_BYTES if group_bytes is None else group_bytes
    groups = _groups(model, weighting, group_bytes)
    if len(groups) <= 1:
        return calibrate(model, run_model, weighting=weighting)
    logger.info(
        f"The weighting {weighting!r} needs more than {group_bytes / 2**30:.3g} GiB of activation statistics, so the calibration "
        f"runs {len(groups)} times, for a group of layers each, and keeps them in {path.parent}."
    )
    scales: dict[str, torch.Tensor] = {}
    fingerprints: dict[str, str] = {}
    files: dict[str, Path] = {}
    for number, names in enumerate(groups, start=1):
        file = path.with_stem(f"{path.stem}-{number}")
        statistics = _stored(file, names, weighting)
        if statistics is None:
            statistics = calibrate(model, run_model, weighting=weighting, layers=names)
            statistics.save(file)
        scales |= statistics
        fingerprints |= statistics.fingerprints
        files |= dict.fromkeys(statistics, file)
    return ActivationStatistics(scales, fingerprints, MOMENTS[weighting], StoredMoments(files))


def _stored(file: Path, names: Sequence[str], weighting: str) -> ActivationStatistics | None:
    """The statistics in `file` if they are those of the layers `names` for `weighting`."""
    if not file.exists():
        return None
    statistics = ActivationStatistics.load(file)
    return statistics if statistics.keys() == set(names) and statistics.supports(weighting) else None


def _groups(model: nn.Module, weighting: str, group_bytes: int) -> list[list[str]]:
    """The names of the NoRA layers in groups whose moments have at most `group_bytes`, or of one layer."""
    kind = MOMENTS.get(weighting)
    sizes = {
        base_name(name): 0 if kind is None else empty_moments(kind, layer.in_features, torch.device("meta")).nbytes
        for name, layer in nora_layers(unwrapped(model)).items()
    }
    return grouped(sizes, group_bytes)


def grouped(sizes: Mapping[str, int], group_bytes: int) -> list[list[str]]:
    """Consecutive names of `sizes`, in bytes, in groups of at most `group_bytes` together, or of one name."""
    groups: list[list[str]] = []
    for name, size in sizes.items():
        if not groups or sum(sizes[each] for each in groups[-1]) + size > group_bytes:
            groups.append([])
        groups[-1].append(name)
    return groups
