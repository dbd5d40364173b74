"""Tensors on disk that are computed once, each in a file named by the hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import PIL
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# To be raised when the same inputs are to give other tensors than before.
CODE_VERSION = 1
LIBRARIES = [module.__version__ for module in (torch, diffusers, transformers, PIL)]


def key_of(**parts: object) -> str:
    """The hash of `parts` (plain values), of this code's version and of the libraries'."""
    text = json.dumps([CODE_VERSION, LIBRARIES, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_digest(module: nn.Module) -> str:
    """The sha256 of a model's weights."""
    return digest_of(module.state_dict())


@dataclass(frozen=True)
class TensorCache:
    """A folder of tensors by key. A file that is damaged, or holds another key, is computed anew.

    Args:
        folder: made when first written to; several processes may use it at once.
    """

    folder: Path

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of `key`; None if the file is missing, damaged or of another key."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as opened:
                metadata, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            warnings.warn(f"{str(path)!r} is damaged ({error}) and is computed anew.", stacklevel=2)
            return None
        if metadata.get("key") != key or metadata.get("sha256") != digest_of(tensors):
            warnings.warn(f"{str(path)!r} does not hold what it was written with, and is computed anew.", stacklevel=2)
            return None
        return tensors

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `tensors` under `key`; a reader sees all of them or nothing."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, beside, metadata={"key": key, "sha256": digest_of(plain)})
        os.replace(beside, path)

    def read_or_make(self, key: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of `key`; if they are not in the cache, they are computed and stored."""
        tensors = self.read(key)
        if tensors is None:
            tensors = {name: value.detach().cpu() for name, value in make().items()}
            self.write(key, tensors)
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
