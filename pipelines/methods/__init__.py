"""The adapter methods: a method is one file here, named as `--method` names it, that defines `METHOD`, an `AdapterMethod`.

Its docstring begins with its title and a colon. Packages installed beside this one add methods by the entry-point group
`nora_vision.methods`: the entry's name is the method's, its object the class. Nothing here imports a model library before a
method is asked for.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import InputError

if TYPE_CHECKING:
    from peft import PeftConfig

    from pipelines.adapter_method import AdapterMethod

ENTRY_POINTS = "nora_vision.methods"
# What a run trains unless a method is given, and what it is compared with.
DEFAULT, REFERENCE = "nora", "lora"


@cache
def _own_files() -> dict[str, Path]:
    return {module.name: Path(module.module_finder.path) / f"{module.name}.py" for module in pkgutil.iter_modules(__path__)}


@cache
def _installed() -> dict[str, EntryPoint]:
    """The methods of other packages. A method of this package is never replaced by one of the same name."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in _own_files()}


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted([*_own_files(), *_installed()])


@cache
def method_named(name: str) -> type[AdapterMethod]:
    """The method called `name`.

    Raises: InputError if there is none, or a package's entry cannot be imported.
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
            f"The method {name!r} of the package {point.dist.name!r} cannot be imported: {error}. Mend or uninstall the package."
        ) from error


@cache
def title_of(name: str) -> str:
    """The title of the method called `name`, such as a page shows it; `name` itself where there is no such method."""
    if name in _own_files():
        return ast.get_docstring(ast.parse(_own_files()[name].read_text(encoding="utf-8"))).partition(":")[0]
    return method_named(name).title if name in _installed() else name


def method_of(config: PeftConfig) -> type[AdapterMethod]:
    """The method that reads, writes and scales adapters of PEFT's type `config.peft_type`, which has its name in lower case."""
    return method_named(config.peft_type.value.lower())
