"""Inputs rebuilt from public bug reports, and real images: beside a checkout where they are there, else the test skips."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def shared_folder(*parts):
    """A folder or file below the shared ones; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.relative_to(SHARED.parent)} is not beside this checkout")
    return path


def case_folder(name):
    """The folder of one rebuilt case, such as `lora-dora-kohya`."""
    return shared_folder("cases", name)
