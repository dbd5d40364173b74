"""What the screens do with models and pictures. Only these modules import torch; the page is up before they are loaded."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

LIBRARIES = ("pipelines.subject.generate", "training.options", "training.options.fewshot", "pipelines.fewshot.classifier")
_loading = threading.Lock()


class _LibrariesFirst(MetaPathFinder):
    """Loads the libraries before the first module of this package, in one thread, while all others that ask for one wait.

    The libraries import each other in circles, which fails where two threads begin at different ends, as handlers would.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Never finds anything: the usual finders follow."""
        if name.startswith(f"{__name__}."):
            with _loading:
                for library in LIBRARIES:
                    importlib.import_module(library)


sys.meta_path.insert(0, _LibrariesFirst())
