"""The built-in models: their names and folders. Imports no model library."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The name of the folder assets/ in a wheel; see setup.py.
ASSETS_IN_WHEEL = ROOT / "nora_vision_assets"
IS_CHECKOUT = not ASSETS_IN_WHEEL.is_dir()
ASSETS = ROOT / "assets" if IS_CHECKOUT else ASSETS_IN_WHEEL
BUILT_IN_MODEL = ASSETS / "mini-sdxl"
# Runs record this name, as the model's folder differs between checkouts.
BUILT_IN = BUILT_IN_MODEL.name
# The name of the built-in CLIP in options.
BUILT_IN_CLIP_NAME = "mini"
BUILT_IN_CLIP, CLIP_WEIGHTS = ASSETS / "mini-clip", "open_clip_model.safetensors"
# The name of the image scorer that is the base model itself.
BASE_SCORER = "base"


def import_path() -> dict[str, str]:
    """Environment variables with which a subprocess can import this project; empty for an installed wheel.

    Start the subprocess with `python -P`. Otherwise, a folder `training` in its working directory would be imported instead.
    """
    if not IS_CHECKOUT:
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def is_built_in(name_or_path: str) -> bool:
    """Whether `name_or_path` is the built-in model: its name, its folder, or its folder in a checkout that no longer exists."""
    path = Path(name_or_path)
    if name_or_path == BUILT_IN or path.resolve() == BUILT_IN_MODEL.resolve():
        return True
    folders = {f"{assets}/{BUILT_IN}" for assets in ("assets", ASSETS_IN_WHEEL.name)}
    return "/".join(path.parts[-2:]) in folders and not path.exists()


def recorded_name(name_or_path: str) -> str:
    """The name of a model in records: `BUILT_IN` for the built-in one, else `name_or_path`."""
    return BUILT_IN if is_built_in(name_or_path) else name_or_path


def model_path(name_or_path: str) -> str:
    """The hub name or path from which libraries load a model: the folder of the built-in one, else `name_or_path`."""
    return str(BUILT_IN_MODEL) if is_built_in(name_or_path) else name_or_path


def portable_name(model: str, private: bool = False) -> str:
    """The name of a local model without its folder; a hub name, or the name of the built-in model, as it is."""
    if is_built_in(model):
        return BUILT_IN
    if not Path(model).exists():
        return model
    return "BASE_MODEL" if private else Path(model).resolve().name
