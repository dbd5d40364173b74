"""Optional packages, which only some flags need."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from pipelines.errors import InputError


def installed(package: str, flag: str) -> ModuleType:
    """Import `package`, which `flag` needs.

    Raises: InputError with the command that installs it, if it is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{flag} needs the package {package}, which is not installed. Install it: pip install {package}")
    return importlib.import_module(package)
