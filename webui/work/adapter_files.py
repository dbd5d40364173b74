"""Checks of uploaded adapter files."""

from __future__ import annotations

from pathlib import Path

from nora_vision.files import AdapterFileError
from pipelines.errors import InputError
from pipelines.subject import lora_files


def check_tensors(path: Path, name: str) -> None:
    """Check that the file at `path` is a safetensors file with a LoRA of a supported kind and only finite values.

    Args:
        name: its name in error messages.
    Raises: InputError if it is not.
    """
    try:
        lora_files.check_file(path)
    except AdapterFileError as error:
        raise InputError(f"{str(error).replace(str(path), name)} Add an adapter in a .safetensors file.") from error
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error


def left_out(path: Path, name: str) -> list[str]:
    """Sentences on the tensors that are not applied, for a file that passes `check_tensors`, with `name` as its name."""
    return [sentence.replace(str(path), name) for sentence in lora_files.left_out(path)]
