"""Training checkpoints: a directory for each step, with hashes of its files. Nothing in them is unpickled."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors.torch import load_file, save
from torch import nn

from pipelines.digests import file_digest
from training.engine.sharding import assign
from training.runs.durable import flush_folder, write_durably
from training.runs.record import list_checkpoints
from training.runs.run_files import step_name

WEIGHTS, STATE, MANIFEST = "trained.safetensors", "state.pt", "manifest.json"
WRITING, DAMAGED = ".writing-", "damaged-"

logger = get_logger(__name__)


def trained_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters of `module` by name, contiguous."""
    return {name: parameter.detach().contiguous() for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path, step: int, module: nn.Module, state: dict[str, object], keep: int, score: float | None = None
) -> Path:
    """Write `step-<step>` under `folder` and delete all but the newest `keep` checkpoints and the best one.

    A reader sees a complete checkpoint or none: the files are written to a temporary directory and flushed, manifest.json gets
    their sha256, and the directory is renamed. If writing fails, the temporary directory is deleted; older checkpoints stay.

    Args:
        module: its trainable parameters are saved as safetensors.
        state: of optimiser, schedule and moving average; must be readable with `torch.load(weights_only=True)`.
        score: a loss measured at this step; the checkpoint with the lowest is kept.
    """
    target = folder / step_name(step)
    aside = folder / f"{WRITING}{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(aside, step, module, state, score)
        # An existing checkpoint of this step is damaged, or the last one of a shorter run.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_folder(folder)
    for old in _superfluous(list_checkpoints(folder), keep):
        shutil.rmtree(old)
    return target


def _write(aside: Path, step: int, module: nn.Module, state: dict[str, object], score: float | None) -> None:
    stream = io.BytesIO()
    torch.save({"step": step, **state}, stream)
    contents = {WEIGHTS: save(trained_state_dict(module)), STATE: stream.getvalue()}
    hashes = {name: write_durably(aside / name, data) for name, data in contents.items()}
    manifest = {"step": step, "score": score, "sha256": hashes}
    write_durably(aside / MANIFEST, json.dumps(manifest, indent=2).encode())
    flush_folder(aside)


def _superfluous(checkpoints: list[Path], keep: int) -> list[Path]:
    """The checkpoints to delete: all but the newest `keep` and the best."""
    best = best_checkpoint(checkpoints)
    return [path for path in checkpoints[:-keep] if path != best]


def best_checkpoint(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest score, the earliest of equals; None if none has a score."""
    scores = {path: _manifest(path).get("score") for path in checkpoints}
    scored = {path: score for path, score in scores.items() if score is not None}
    return min(scored, key=scored.__getitem__, default=None)


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under `folder` whose files match their hashes; None if there is none.

    Damaged checkpoints are renamed to `damaged-step-<step>` with a warning, and incomplete ones are deleted.
    """
    for leftover in folder.glob(f"{WRITING}*"):
        shutil.rmtree(leftover)
    for path in reversed(list_checkpoints(folder)):
        damage = damage_of(path)
        if damage is None:
            return path
        aside = path.with_name(DAMAGED + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning(
            f"The checkpoint {str(path)!r} is damaged ({damage}). It was renamed to {aside.name!r}; the one before it is used."
        )
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if it is intact."""
    missing = {WEIGHTS, STATE, MANIFEST} - {file.name for file in path.iterdir()}
    if missing:
        return f"{min(missing)} is missing"
    hashes = _manifest(path).get("sha256")
    if not isinstance(hashes, dict) or set(hashes) != {WEIGHTS, STATE}:
        return f"{MANIFEST} cannot be read"
    wrong = [name for name, expected in hashes.items() if file_digest(path / name) != expected]
    return f"{wrong[0]} does not have the sha256 in {MANIFEST}" if wrong else None


def _manifest(path: Path) -> dict[str, object]:
    """The fields of a checkpoint's manifest; empty if it is missing or cannot be read."""
    file = path / MANIFEST
    try:
        fields = json.loads(file.read_bytes()) if file.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return fields if isinstance(fields, dict) else {}


def load_checkpoint(path: Path, module: nn.Module) -> dict[str, object]:
    """Load the trainable parameters of `module` from `path`; returns the other states.

    Raises: ValueError if the checkpoint has other parameters.
    """
    saved, trained = load_file(path / WEIGHTS), dict(module.named_parameters())
    expected = {name for name, parameter in trained.items() if parameter.requires_grad}
    if expected != set(saved):
        different = sorted(expected ^ set(saved))[:3]
        raise ValueError(
            f"The checkpoint {str(path)!r} belongs to another model or adapter: parameters such as {', '.join(different)} are in "
            "only one of them. Give the options that the run was started with."
        )
    for name, value in saved.items():
        assign(trained[name], value)
    return torch.load(path / STATE, weights_only=True, map_location="cpu")
