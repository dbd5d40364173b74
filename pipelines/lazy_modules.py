"""Libraries that are imported when a name of them is first used.

They take seconds to import. A command's `--help` and the page read the options of all methods, and need none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class LazyModule(ModuleType):
    """The module of this name, imported at the first look-up of an attribute."""

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self.__name__), attribute)
        # The next look-up does not come here.
        setattr(self, attribute, value)
        return value


if TYPE_CHECKING:
    import safetensors
    import torch
    import transformers
    from timm import optim as timm_optim
    from torch import nn
    from torch.nn import functional
    from torch.nn.utils import parametrize

    from pipelines import parametrizations
else:
    torch, safetensors, transformers = map(LazyModule, ("torch", "safetensors", "transformers"))
    nn, functional, parametrize = map(LazyModule, ("torch.nn", "torch.nn.functional", "torch.nn.utils.parametrize"))
    timm_optim = LazyModule("timm.optim")
    # Subclasses of nn.Module, whose definition needs torch.
    parametrizations = LazyModule("pipelines.parametrizations")


def no_grad(function: Function) -> Function:
    """A decorator as torch.no_grad(), which would import torch at once."""

    @wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            return function(*arguments, **named)

    return wrapped
