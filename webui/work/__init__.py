"""The work that needs model libraries. Only these modules import torch, so that the page opens before it is loaded.

Handlers import a module from this package, `from webui.work import options`, never a name from a module. The first import loads
all libraries while other threads wait: the libraries import each other in cycles, which fails if two threads enter a cycle at
different modules.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from types import ModuleType

LIBRARIES = ("pipelines.subject.generate", "training.options", "training.options.fewshot", "pipelines.fewshot.classifier")
MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__))
# A separate lock: if an import lock were held, threads that a library starts while it is imported would deadlock.
_loading = threading.Lock()


def __getattr__(name: str) -> ModuleType:
    """The module `name` of this package; loads the libraries first."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _loading:
        for library in LIBRARIES:
            importlib.import_module(library)
    return importlib.import_module(f"{__name__}.{name}")
