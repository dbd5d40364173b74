"""An adapter's native files: PEFT's configuration and tensors, with digests and the method's name in the tensors' header."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.lazy_modules import torch

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The pattern of the layers of a text encoder that SDXL does not use.
EXCLUDED_LAYER = re.compile(r"\.\*layers\\\.\d+\\\.\.\*")
FULL, COMPACT = "full", "compact"
# The key in the header for the name of the method; a PEFT type may be used by several methods.
METHOD_KEY = "nora_vision_method"


class NativeFiles(NamedTuple):
    """The content of one component's PEFT files: the configuration, the tensors, and the metadata in the tensors' header."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def save_config(config: PeftConfig, folder: Path) -> None:
    """Write `config` as PEFT does, but with sorted sets: PEFT's order of their entries differs between processes."""
    config = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def write_native(
    folder: Path, config: PeftConfig, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write PEFT's two files to `folder`, with `metadata` and digests of the tensors and the configuration in the header."""
    from nora_vision.files import CONFIGURATION, configuration_digest, read_json, write_tensors

    save_config(config, folder)
    digest = {CONFIGURATION: configuration_digest(read_json(folder / CONFIG))}
    write_tensors(folder / WEIGHTS, tensors, {**(metadata or {}), **digest}, digest=True)


def read_native(folder: Path) -> NativeFiles:
    """Read what `write_native` wrote.

    Raises: AdapterFileError if a file was changed after it was saved, its names are regular
        expressions, or PEFT refuses the configuration.
    """
    from peft import PeftConfig

    from nora_vision.files import AdapterFileError, check_configuration, read_json, read_tensors

    metadata, fields = read_metadata(folder), read_json(folder / CONFIG)
    check_configuration(metadata, fields, folder)
    _check_names(fields, folder / CONFIG)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder / CONFIG} is not a valid configuration: {error}") from error
    return NativeFiles(config, read_tensors(folder / WEIGHTS, dtypes=_dtypes()), metadata)


def _check_names(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse names that PEFT would match as regular expressions, some of which take exponential time.

    Raises: AdapterFileError naming the field.
    """
    from nora_vision.files import AdapterFileError

    for field, value in fields.items():
        if field.endswith(("_modules", "_pattern")) and value is not None and not _are_plain_names(value):
            raise AdapterFileError(f"{path} is not a valid configuration: {field} must list plain names, got {value!r:.200}.")


def _are_plain_names(value: Any) -> bool:
    from nora_vision.files import PLAIN_NAME

    if not isinstance(value, (list, dict)):
        return EXCLUDED_LAYER.fullmatch(str(value)) is not None
    return all(isinstance(name, str) and PLAIN_NAME.fullmatch(name) for name in value)


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata in the header of a component's tensors.

    Raises: AdapterFileError if the header is malformed.
    """
    from nora_vision.files import read_header

    return dict(read_header(folder / WEIGHTS, _dtypes()).metadata)


def _dtypes() -> dict[str, torch.dtype]:
    """The allowed dtypes; some methods save indices."""
    from nora_vision.files import DTYPES

    return {**DTYPES, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
