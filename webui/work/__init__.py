"""What the screens do with models and images. Only these modules import torch; the page is up before they are loaded.

Handlers ask for a module as an attribute, `from webui.work import options`, and never for what is in it: the libraries import
each other in circles, which fails where two threads begin at different ends, so that the first to ask loads all of them while
the others wait.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from types import ModuleType

LIBRARIES = ("pipelines.subject.generate", "training.options", "training.options.fewshot", "pipelines.fewshot.classifier")
MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__))
# Not one of the import system's own: whoever holds those makes threads that a library starts wait forever.
_loading = threading.Lock()


def __getattr__(name: str) -> ModuleType:
    """The module `name` of this package, once the libraries are there."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _loading:
        for library in LIBRARIES:
            importlib.import_module(library)
    return importlib.import_module(f"{__name__}.{name}")
