"""Saving and loading an adapter's native files, which its method writes and reads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from nora_vision.calibration import BaseCalibration
from nora_vision.factors import is_weight_change
from nora_vision.files import read_json
from nora_vision.inner import gated
from pipelines.adapter_method import ADAPTER_NAME
from pipelines.methods import method_named, method_of
from pipelines.native_files import COMPACT, CONFIG, FULL, METHOD_KEY, read_metadata

logger = logging.getLogger(__name__)


def save(components: Mapping[str, nn.Module], folder: Path, adapter_name: str = ADAPTER_NAME) -> None:
    """Write the adapter's native files at scale 1, in every layout of its method, to `folder/<layout>/<component>`."""
    config = next(iter(components.values())).peft_config[adapter_name]
    method_of(config).save(components, folder, adapter_name)


def can_be_exported(components: Mapping[str, nn.Module], adapter_name: str = ADAPTER_NAME) -> bool:
    """Whether the adapter is a change of weights, which files for other programs can hold; if not, the log says so."""
    if all(is_weight_change(model, adapter_name) for model in components.values()):
        return True
    logger.warning(f"{gated('This adapter is')} There are no files for other programs.")
    return False


def load(
    components: Mapping[str, nn.Module],
    folder: Path,
    adapter_name: str = ADAPTER_NAME,
    base_calibration: Mapping[str, BaseCalibration] = MappingProxyType({}),
) -> None:
    """Load the adapter that `save` wrote to the layout `folder` onto each of `components`.

    Args:
        base_calibration: for each component, the statistics on fixed inputs that some files need.
    Raises: InputError or AdapterFileError naming the file and what is wrong with it.
    """
    for name, model in components.items():
        method = method_named(_method_in(folder / name))
        method.load_calibrated({name: model}, folder, adapter_name, base_calibration)


def _method_in(folder: Path) -> str:
    """The name of the method that wrote a component's files; files of other programs have only a PEFT type."""
    noted = read_metadata(folder).get(METHOD_KEY)
    return noted or str(read_json(folder / CONFIG).get("peft_type")).lower()


def native_folder(path: Path, components: Iterable[str]) -> Path | None:
    """The folder of the native adapter at `path`, a layout's folder or a run directory; None if there is none.

    The full layout is preferred to the compact one.

    Args:
        components: names of the pipeline's components that may have an adapter.
    """
    components = tuple(components)
    for folder in (path, path / FULL, path / "adapter" / FULL, path / COMPACT, path / "adapter" / COMPACT):
        if any((folder / name / CONFIG).is_file() for name in components):
            return folder
    return None
