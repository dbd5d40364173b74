"""The native files of an adapter: each is written and read by its method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from nora_vision.files import read_json
from pipelines.adapter_method import ADAPTER_NAME, COMPACT, CONFIG, FULL
from pipelines.methods import method_named, method_of


def save(components: Mapping[str, nn.Module], folder: Path, adapter_name: str = ADAPTER_NAME) -> None:
    """Write the adapter's native files, at scale 1, in every layout of its method: `folder/<layout>/<component>`."""
    config = next(iter(components.values())).peft_config[adapter_name]
    method_of(config).save(components, folder, adapter_name)


def load(components: Mapping[str, nn.Module], folder: Path, adapter_name: str = ADAPTER_NAME) -> None:
    """Add the adapter that `save` wrote in the layout `folder` to each of `components`.

    Raises: InputError or AdapterFileError naming the file, and what of it does not fit.
    """
    for name, model in components.items():
        method = str(read_json(folder / name / CONFIG).get("peft_type")).lower()
        method_named(method).load({name: model}, folder, adapter_name)


def native_folder(path: Path, components: Iterable[str]) -> Path | None:
    """The native adapter at `path`: itself, or the full one of a run's directory, or the compact one where it is alone.

    Args:
        components: the names of what may be adapted.
    """
    components = tuple(components)
    for folder in (path, path / FULL, path / "adapter" / FULL, path / COMPACT, path / "adapter" / COMPACT):
        if any((folder / name / CONFIG).is_file() for name in components):
            return folder
    return None
