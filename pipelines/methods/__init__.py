"""The adapter methods, one file each.

The file's name is the value of `--method`, its docstring begins with the method's title and a colon, and it defines `METHOD`, a
subclass of `AdapterMethod`. Other packages add methods by the entry-point group `nora_vision.methods`: `name = "module:Class"`.
Model libraries are imported only when a method is requested.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pipelines.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig

    from pipelines.adapter_method import AdapterMethod

ENTRY_POINTS = "nora_vision.methods"
# The default method, and the one that methods are compared with.
DEFAULT, REFERENCE = "nora", "lora"
# The value of --method that leaves the choice to the recipe; see docs/arena.md.
AUTO = "auto"
# Python 3.11's parser fails with a SystemError if another thread parses at the same time.
_PARSING = Lock()


@cache
def _own_files() -> dict[str, Path]:
    return {module.name: Path(module.module_finder.path) / f"{module.name}.py" for module in pkgutil.iter_modules(__path__)}


@cache
def _installed() -> dict[str, EntryPoint]:
    """The methods of other packages, which cannot replace a method of this package."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in _own_files()}


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted([*_own_files(), *_installed()])


@cache
def method_named(name: str) -> type[AdapterMethod]:
    """The method called `name`.

    Raises: InputError if there is none, or a package's entry point cannot be imported.
    """
    if name in _own_files():
        return importlib.import_module(f"{__name__}.{name}").METHOD
    if name not in _installed():
        raise InputError(f"method must be one of {', '.join(method_names())}, got {name!r}.")
    point = _installed()[name]
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The method {name!r} of the package {point.dist.name!r} cannot be imported: {error}. Fix or uninstall the package."
        ) from error


@cache
def title_of(name: str) -> str:
    """The title of the method called `name`, as shown to users; `name` itself if there is no such method."""
    if name in _own_files():
        return _first_sentence(name).partition(":")[0]
    return method_named(name).title if name in _installed() else name


def equation_of(name: str) -> str:
    """The equation of a method: what its file's first sentence has between the title and the source.

    For a method of another package, whose file may have none, its reference.
    """
    if name not in _own_files():
        return method_named(name).reference
    return re.sub(r"\s*\[[^\]]*\]$", "", _first_sentence(name).partition(": ")[2].rstrip("."))


@cache
def _first_sentence(name: str) -> str:
    with _PARSING:
        text = ast.get_docstring(ast.parse(_own_files()[name].read_text(encoding="utf-8")))
    return text.split("\n\n")[0].replace("\n", " ")


def method_of(config: PeftConfig) -> type[AdapterMethod]:
    """The method of an adapter: the one noted in its configuration, else the one named like its PEFT type in lower case."""
    return method_named(getattr(config, "nora_vision_method", config.peft_type.value.lower()))
