"""Range checks for the fields of options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pipelines.errors import InputError


def at_least(options: object, least: float, *names: str) -> None:
    """Raise InputError if one of the fields `names` of `options` is below `least`; None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def above_zero(options: object, *names: str) -> None:
    """Raise InputError if one of the fields `names` of `options` is not above 0; None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}.")


def below_one(options: object, *names: str) -> None:
    """Raise InputError if one of the fields `names` of `options`, a probability, is not in [0, 1)."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < 1:
            raise InputError(f"{name} must be in [0, 1), got {value}.")


def within(options: object, least: float, most: float, *names: str) -> None:
    """Raise InputError if one of the fields `names` of `options` is not in [`least`, `most`]."""
    for name in names:
        value = getattr(options, name)
        if not least <= value <= most:
            raise InputError(f"{name} must be in [{least}, {most}], got {value}.")


def one_of(options: object, allowed: Sequence[str], *names: str) -> None:
    """Raise InputError if one of the fields `names` of `options` is not in `allowed`."""
    for name in names:
        value = getattr(options, name)
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def check_choices(options: Any) -> None:
    """Raise InputError if a field of the dataclass `options` with choices has another value."""
    for field in fields(options):
        if "choices" in field.metadata:
            one_of(options, field.metadata["choices"], field.name)
