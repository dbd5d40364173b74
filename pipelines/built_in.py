"""The models that come with this project: their names, and where SDXL's lies. Imports no model library."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN_MODEL = ASSETS / "mini-sdxl"
# What runs record, since the model's folder differs from checkout to checkout.
BUILT_IN = BUILT_IN_MODEL.name
# What options call the built-in CLIP.
BUILT_IN_CLIP_NAME = "mini"


def is_built_in(name_or_path: str) -> bool:
    """Whether `name_or_path` is the model that comes with this project: its name, its folder, or that of a checkout now gone."""
    path = Path(name_or_path)
    if name_or_path == BUILT_IN or path.resolve() == BUILT_IN_MODEL.resolve():
        return True
    return path.parts[-2:] == BUILT_IN_MODEL.parts[-2:] and not path.exists()


def recorded_name(name_or_path: str) -> str:
    """What records call a model: `BUILT_IN` for the built-in one wherever it lies, else `name_or_path`."""
    return BUILT_IN if is_built_in(name_or_path) else name_or_path


def model_path(name_or_path: str) -> str:
    """The hub name or path that libraries load a model by: the built-in one's folder, else `name_or_path`."""
    return str(BUILT_IN_MODEL) if is_built_in(name_or_path) else name_or_path
