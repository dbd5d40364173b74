"""Adapter files from outside."""

from __future__ import annotations

from pathlib import Path

from nora_vision.files import AdapterFileError, read_tensors
from pipelines.errors import InputError

# What the names of an adapter's tensors contain, in the layouts of PEFT, diffusers and kohya.
MARKS = ("lora_", "nora_", "lora.")


def check_tensors(path: Path, name: str) -> None:
    """Check that the file at `path` is safetensors with an adapter's tensors, all finite.

    Args:
        name: what errors call it.
    Raises: InputError saying what is wrong with it.
    """
    try:
        tensors = read_tensors(path)
    except AdapterFileError as error:
        raise InputError(f"{str(error).replace(str(path), name)} Give an adapter as a .safetensors file.") from error
    if not any(mark in key for key in tensors for mark in MARKS):
        raise InputError(f"{name} holds no adapter, but other tensors. Give the .safetensors file of a LoRA or NoRA adapter.")
