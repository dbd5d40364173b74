"""Checks that options share."""

from __future__ import annotations

from pipelines.errors import InputError


def at_least(options: object, least: float, *names: str) -> None:
    """Refuse a named field of `options` below `least`; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{name} must be at least {least}, got {value}.")


def above_zero(options: object, *names: str) -> None:
    """Refuse a named field of `options` that is not above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"{name} must be above 0, got {value}.")
