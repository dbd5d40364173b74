"""The models that come with this project: their names and folders. Imports no model library."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What assets/ of a checkout is called in a wheel: see setup.py.
ASSETS_IN_WHEEL = ROOT / "nora_vision_assets"
IS_CHECKOUT = not ASSETS_IN_WHEEL.is_dir()
ASSETS = ROOT / "assets" if IS_CHECKOUT else ASSETS_IN_WHEEL
BUILT_IN_MODEL = ASSETS / "mini-sdxl"
# What runs record, since the model's folder differs from checkout to checkout.
BUILT_IN = BUILT_IN_MODEL.name
# What options call the built-in CLIP.
BUILT_IN_CLIP_NAME = "mini"


def import_path() -> dict[str, str]:
    """What to add to the environment of a process that imports this project, so that it finds a checkout as well.

    Start it with `python -P`: a folder `training` in the working directory would otherwise be imported in place of this one.
    """
    if not IS_CHECKOUT:
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def is_built_in(name_or_path: str) -> bool:
    """Whether `name_or_path` is the model that comes with this project: its name, its folder, or that of a checkout now gone."""
    path = Path(name_or_path)
    if name_or_path == BUILT_IN or path.resolve() == BUILT_IN_MODEL.resolve():
        return True
    folders = {f"{assets}/{BUILT_IN}" for assets in ("assets", ASSETS_IN_WHEEL.name)}
    return "/".join(path.parts[-2:]) in folders and not path.exists()


def recorded_name(name_or_path: str) -> str:
    """What records call a model: `BUILT_IN` for the built-in one wherever it lies, else `name_or_path`."""
    return BUILT_IN if is_built_in(name_or_path) else name_or_path


def model_path(name_or_path: str) -> str:
    """The hub name or path that libraries load a model by: the built-in one's folder, else `name_or_path`."""
    return str(BUILT_IN_MODEL) if is_built_in(name_or_path) else name_or_path
