"""An on-disk cache of tensors. Each file is named by a hash of everything that its tensors depend on."""

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

# Increase this when the code computes other tensors from the same inputs.
CODE_VERSION = 1
LIBRARIES = [module.__version__ for module in (torch, diffusers, transformers, PIL)]


def key_of(**parts: object) -> str:
    """A hash of `parts` (plain values), `CODE_VERSION` and the versions of the libraries."""
    text = json.dumps([CODE_VERSION, LIBRARIES, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of tensors of any shape, with their names, dtypes and shapes."""
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
    """A folder of tensors by key. Files that are damaged or hold another key count as missing.

    Args:
        folder: created on the first write; several processes may use it at the same time.
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
            warnings.warn(f"The cached file {str(path)!r} is damaged ({error}); it is computed again.", stacklevel=2)
            return None
        if metadata.get("key") != key or metadata.get("sha256") != digest_of(tensors):
            warnings.warn(f"The cached file {str(path)!r} does not match its digest; it is computed again.", stacklevel=2)
            return None
        return tensors

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store `tensors` under `key`; the file is replaced atomically."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, beside, metadata={"key": key, "sha256": digest_of(plain)})
        os.replace(beside, path)

    def read_or_make(self, key: str, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of `key`; if they are missing, `make` computes them and they are stored."""
        tensors = self.read(key)
        if tensors is None:
            tensors = {name: value.detach().cpu() for name, value in make().items()}
            self.write(key, tensors)
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"
