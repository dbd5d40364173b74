"""Training checkpoints: one directory a step, written aside and renamed; nothing in them is ever unpickled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, STATE = "trained.safetensors", "state.pt"


def trained_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `module` that are trained, by name, contiguous."""
    return {name: parameter.detach().contiguous() for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, step: int, module: nn.Module, state: dict[str, object], keep: int) -> Path:
    """Write `step-<step>` under `folder` and delete all but the newest `keep` checkpoints.

    Args:
        module: its trained parameters are saved as safetensors.
        state: whatever `torch.load(weights_only=True)` reads back: optimiser, schedule and EMA states.
    """
    target = folder / f"step-{step:07d}"
    aside = folder / f".writing-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(trained_state_dict(module), aside / WEIGHTS)
    torch.save({"step": step, **state}, aside / STATE)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(path: Path, module: nn.Module) -> dict[str, object]:
    """Load the trained parameters of `module` from `path` and return the other states.

    Raises: ValueError if the checkpoint's parameters are not those that `module` trains.
    """
    saved, trained = load_file(path / WEIGHTS), dict(module.named_parameters())
    expected = {name for name, parameter in trained.items() if parameter.requires_grad}
    if expected != set(saved):
        strange = sorted(expected ^ set(saved))[:3]
        raise ValueError(
            f"Checkpoint {str(path)!r} is of another model or adapter: parameters differ, such as {', '.join(strange)}."
        )
    with torch.no_grad():
        for name, value in saved.items():
            trained[name].copy_(value)
    return torch.load(path / STATE, weights_only=True, map_location="cpu")
