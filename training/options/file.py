"""Options from a file: a run's own options.json, or a .json or .yaml file written by hand."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from pipelines.deprecated_flags import with_current_names
from pipelines.errors import InputError
from pipelines.run_options import OPTIONS, is_run, task_of
from pipelines.text_files import read_text

# What belongs to the run that wrote its options, and not to one that repeats it.
OF_ONE_RUN = ("output_dir", "resume_from_checkpoint")
SCRIPTS = {"subject": "dreambooth_nora.py", "few-shot": "fewshot_nora.py"}


def read_options_file(path: Path) -> dict[str, Any]:
    """The fields in a file, each a text, a list of texts, a table or None; nothing but plain values is ever made of it.

    Raises: InputError naming the file if it cannot be read or is no table of options.
    """
    readers = {".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise InputError(f"options_file must be a {', '.join(readers)} file, got {str(path)!r}.")
    try:
        values = readers[path.suffix.lower()](read_text(path))
    except (InputError, json.JSONDecodeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"The options_file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"The options_file {str(path)!r} must hold options by name, got {type(values).__name__}.")
    return values


def _read_json(text: str) -> Any:
    # Numbers stay as they are written: the flags' own types read them.
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _read_yaml(text: str) -> Any:
    # Texts all of them, so that `no` is a word and 1e-4 a number.
    return yaml.load(text, Loader=yaml.BaseLoader)


def as_flags(path: Path, parser: argparse.ArgumentParser, groups: Collection[str]) -> list[str]:
    """The file's options as flags for `parser`; those that are lists become its defaults.

    Fields may stand alone or within tables named as `groups`; null is what is not said. A run's own options.json starts
    another run: the directory and the resuming of that run are left out.

    Raises: InputError naming a field that is none, or the file if it cannot be read.
    """
    actions = {action.dest: action for action in parser._actions}
    flags = []
    for name, value in _fields_of(path, groups).items():
        _check_name(path, name, actions)
        if value is None or (path.suffix.lower() != ".json" and value in ("", "null", "~")):
            continue
        if actions[name].nargs == "+" and not isinstance(value, dict):
            parser.set_defaults(**{name: _typed_list(path, actions[name], value if isinstance(value, list) else [value])})
        elif isinstance(value, dict | list):
            raise InputError(f"The option {name!r} in {str(path)!r} must be one value, got {value!r}.")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _typed_list(path: Path, action: argparse.Action, values: list[Any]) -> list[Any]:
    """The values of an option that takes several, in the flag's type: argparse converts no list that is a default."""
    try:
        return [(action.type or str)(str(value)) for value in values]
    except ValueError as error:
        raise InputError(f"The option {action.dest!r} in {str(path)!r} cannot be read: {error}.") from error


def _fields_of(path: Path, groups: Collection[str]) -> dict[str, Any]:
    """The file's fields, those within tables too, without what belongs to the run that wrote them."""
    fields: dict[str, Any] = {}
    values = with_current_names(read_options_file(path))
    _check_script(path, values, groups)
    for name, value in values.items():
        fields |= value if name in groups and isinstance(value, dict) else {name: value}
    if path.name == OPTIONS and is_run(path.parent):
        return {name: value for name, value in fields.items() if name not in OF_ONE_RUN}
    return fields


def _check_name(path: Path, name: str, names: Collection[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"The options_file {str(path)!r} has an option {name!r}, which there is not.{hint}")


def _check_script(path: Path, values: dict[str, Any], groups: Collection[str]) -> None:
    """Refuse the options of another task's run, which this script would find full of unknown names."""
    task = task_of({name: group for name, group in values.items() if isinstance(group, dict)})
    expected = "few-shot" if "target_layers" in groups else "subject"
    if task not in (None, expected):
        raise InputError(
            f"The options_file {str(path)!r} is of a {task} run, and this script trains {expected} runs. Start it with "
            f"training/{SCRIPTS[task]}."
        )
