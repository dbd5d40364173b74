"""Renamed options: old names in flags, options files and a run's options.json are replaced by the current ones."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RENAMED_OPTIONS = {
    "crops_per_picture": "crops_per_image",
    "drawn_candidates": "num_candidate_images",
    "judge_model": "image_scorer",
    "ladder": "memory_fallback",
    "photos_dir": "images_dir",
    "strength": "scale",
}
RENAMED_VALUES = {"size_conditioning": {"picture": "image"}}
RENAMED_GROUPS = {"judging": "validation", "places": "target_layers"}
logger = logging.getLogger(__name__)


def current_arguments(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`arguments` with the deprecated flags and values of `parser` replaced; a warning names the new flag for each."""
    flags = dict(_deprecated_flags(parser))
    current, flag, logged = [], "", set()
    for argument in arguments:
        # Arguments after a flag are its values.
        is_flag = argument.startswith("--")
        name, separator, value = argument.partition("=") if is_flag else (flag, "", argument)
        if is_flag:
            flag = flags.get(name, name)
            if name in flags and name not in logged:
                logged.add(name)
                logger.warning("%s is deprecated; use %s.", name, flag)
        value = RENAMED_VALUES.get(flag.removeprefix("--"), {}).get(value, value)
        current.append(f"{flag}{separator}{value}" if is_flag else value)
    return current


def _deprecated_flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Old and new name of each renamed flag that `parser` has."""
    for old, new in RENAMED_OPTIONS.items():
        for prefix in ("--", "--no_"):
            if f"{prefix}{new}" in parser._option_string_actions and f"{prefix}{old}" not in parser._option_string_actions:
                yield f"{prefix}{old}", f"{prefix}{new}"


def with_current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, grouped or not, with the groups, names and values of earlier versions replaced."""
    current: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            current[RENAMED_GROUPS.get(name, name)] = with_current_names(value)
        else:
            current_name = RENAMED_OPTIONS.get(name, name)
            renamed = RENAMED_VALUES.get(current_name, {})
            current[current_name] = renamed.get(value, value) if isinstance(value, str) else value
    return current
