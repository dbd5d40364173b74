"""Adapter files from outside."""

from __future__ import annotations

from pathlib import Path

from nora_vision.files import AdapterFileError
from pipelines.errors import InputError
from pipelines.subject import lora_files


def check_tensors(path: Path, name: str) -> None:
    """Check that the file at `path` is safetensors with a LoRA's tensors of a kind that is read, all finite.

    Args:
        name: what errors call it.
    Raises: InputError saying what is wrong with it.
    """
    try:
        lora_files.check_file(path)
    except AdapterFileError as error:
        raise InputError(f"{str(error).replace(str(path), name)} Give an adapter as a .safetensors file.") from error
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error


def left_out(path: Path, name: str) -> list[str]:
    """What of a file that passes `check_tensors` is left out, in sentences that call it `name`."""
    return [sentence.replace(str(path), name) for sentence in lora_files.left_out(path)]
