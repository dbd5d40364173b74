"""Options from a file: the options.json of a run, or a .json or .yaml file written by hand."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import InputError
from pipelines.run_file import VERSION, ResolvedOptions
from pipelines.run_options import is_run, task_of
from pipelines.text_files import read_text

# Options that a run with the same options must not take over.
OF_ONE_RUN = ("output_dir", "resume_from_checkpoint")
SCRIPTS = {"subject": "dreambooth_nora.py", "few-shot": "fewshot_nora.py"}


def read_options_file(path: Path) -> dict[str, Any]:
    """The options in a file as plain values: texts, lists of texts, tables and None.

    Raises: InputError naming the file if it cannot be read or does not hold options by name.
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
    # Numbers stay as they are written, because the types of the flags parse them.
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _read_yaml(text: str) -> Any:
    # All values stay texts, so that `no` is not read as a boolean and the types of the flags parse 1e-4.
    return yaml.load(text, Loader=yaml.BaseLoader)


def as_flags(path: Path, parser: argparse.ArgumentParser, groups: Collection[str]) -> list[str]:
    """The options of the file as flags for `parser`; lists become defaults of `parser`.

    Options may stand alone or within tables named as `groups`; an option that is null keeps its default. The options.json of a
    run starts another run, so its directory and whether it was resumed are left out.

    Raises: InputError naming an option that does not exist, or the file if it cannot be read.
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
            raise InputError(f"The option {name!r} in {str(path)!r} must be a single value, got {value!r}.")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _typed_list(path: Path, action: argparse.Action, values: list[Any]) -> list[Any]:
    """The values of an option that takes several, converted to the flag's type: argparse does not convert a default list."""
    try:
        return [(action.type or str)(str(value)) for value in values]
    except ValueError as error:
        raise InputError(f"The option {action.dest!r} in {str(path)!r} cannot be read: {error}.") from error


def _fields_of(path: Path, groups: Collection[str]) -> dict[str, Any]:
    """The options of the file without their groups, and without those of `OF_ONE_RUN` if a run wrote the file."""
    fields: dict[str, Any] = {}
    values = read_options_file(path)
    if str(values.get(VERSION)).isdecimal():
        values[VERSION] = int(values[VERSION])
    values = ResolvedOptions.from_json(values).groups
    _check_script(path, values, groups)
    for name, value in values.items():
        fields |= value if name in groups and isinstance(value, dict) else {name: value}
    if path.name == ResolvedOptions.NAME and is_run(path.parent):
        return {name: value for name, value in fields.items() if name not in OF_ONE_RUN}
    return fields


def _check_name(path: Path, name: str, names: Collection[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"The options_file {str(path)!r} has an option {name!r}, which does not exist.{hint}")


def _check_script(path: Path, values: dict[str, Any], groups: Collection[str]) -> None:
    """Refuse the options of the other task."""
    task = task_of({name: group for name, group in values.items() if isinstance(group, dict)})
    expected = "few-shot" if "target_layers" in groups else "subject"
    if task not in (None, expected):
        raise InputError(
            f"The options_file {str(path)!r} belongs to a {task} run, but this script trains {expected} runs. Use it with "
            f"training/{SCRIPTS[task]}."
        )
