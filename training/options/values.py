"""The options of a recipe as plain values by group and field: as a dataclass, as flags, and without the defaults."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from pipelines.errors import InputError
from training.options import SubjectOptions
from training.options.command_line import groups_of
from training.options.fewshot import FewShotOptions

Options = SubjectOptions | FewShotOptions
Values = dict[str, dict[str, Any]]
KINDS: dict[str, type[Options]] = {"subject": SubjectOptions, "classify": FewShotOptions}
# Options of one run, which another run does not take over.
OF_ONE_RUN = frozenset({"output_dir", "resume_from_checkpoint", "hub_token"})


def kind_of(task: str) -> type[Options]:
    """The class of the options of `task`.

    Raises: InputError if the task does not exist.
    """
    if task not in KINDS:
        raise InputError(f"The task must be one of {', '.join(KINDS)}, got {task!r}.")
    return KINDS[task]


@cache
def groups(task: str) -> dict[str, dict[str, dataclasses.Field]]:
    """The fields of the options of `task` by group and name, with their types resolved."""
    resolved: dict[str, dict[str, dataclasses.Field]] = {}
    for name, group in groups_of(kind_of(task)).items():
        hints = typing.get_type_hints(group)
        # Copies, because HfArgumentParser changes the types of the fields.
        resolved[name] = {field.name: copy.copy(field) for field in dataclasses.fields(group)}
        for field in resolved[name].values():
            field.type = hints[field.name]
    return resolved


def default_of(field: dataclasses.Field) -> Any:
    """The default value of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def defaults(task: str) -> Values:
    """The default values of all options of `task`, None where the recipe decides."""
    return {group: {name: default_of(option) for name, option in fields.items()} for group, fields in groups(task).items()}


def merged(*values: Mapping[str, Mapping[str, Any]]) -> Values:
    """All values together; later ones override earlier ones, and empty groups are left out."""
    names = dict.fromkeys(name for each in values for name in each)
    groups = {name: {field: value for each in values for field, value in each.get(name, {}).items()} for name in names}
    return {name: fields for name, fields in groups.items() if fields}


def without(values: Mapping[str, Mapping[str, Any]], names: Mapping[str, typing.Collection[str]]) -> Values:
    """`values` without the fields `names`, by group."""
    return merged({group: {k: v for k, v in fields.items() if k not in names.get(group, ())} for group, fields in values.items()})


def built(task: str, values: Values) -> Options:
    """The options of `task` with typed `values` in place of the defaults.

    Raises: InputError for an invalid value.
    """
    kind = kind_of(task)
    try:
        return kind(**{name: group(**values.get(name, {})) for name, group in groups_of(kind).items()})
    except InputError:
        raise
    except ValueError as error:
        # Raised by a library rather than by our checks.
        raise InputError(str(error)) from error


def flags(task: str, values: Values) -> list[str]:
    """The flags of the recipe's command for typed values.

    Raises: InputError for a value that cannot be written on a command line.
    """
    words: list[str] = []
    for group, fields in values.items():
        for name, value in fields.items():
            default = default_of(groups(task)[group][name])
            if value is False and default is None:
                words += _pair(name, str(value))
            elif value != default:
                words += _flag(name, value)
    return words


def changed(task: str, resolved: Mapping[str, Any]) -> Values:
    """The resolved options of a run (options.json) that differ from the defaults, to start another run from.

    Options that belong to that run only, and values that the recipe derives from the base model or the images, are left out.
    """
    given: Values = {}
    for group, fields in groups(task).items():
        values = resolved.get(group)
        for name in fields.keys() & values.keys() - OF_ONE_RUN if isinstance(values, dict) else ():
            if values[name] is not None and values[name] != default_of(fields[name]):
                given.setdefault(group, {})[name] = values[name]
    return _without_derived(task, given)


def _without_derived(task: str, given: Values) -> Values:
    """`given` without the values that the recipe would choose if they were not given."""
    complete = built(task, given).to_dict()
    for group, name in [(group, name) for group, fields in given.items() for name in fields]:
        fewer = without(given, {group: {name}})
        try:
            same = built(task, fewer).to_dict() == complete
        except InputError:
            continue
        if same:
            return _without_derived(task, fewer)
    return given


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if not isinstance(value, list):
        return _pair(name, _word(value))
    items = [_word(item) for item in value]
    if len(items) > 1 and any(item.startswith("-") for item in items):
        wrong = next(item for item in items if item.startswith("-"))
        raise InputError(f"A value of {name} must not begin with a hyphen, got {wrong!r}. Begin it with a letter.")
    return _pair(name, items[0]) if len(items) == 1 else [f"--{name}", *items]


def _pair(name: str, word: str) -> list[str]:
    # As an argument of its own, a value that begins with a hyphen would be read as a flag.
    return [f"--{name}={word}"] if word.startswith("-") or not word else [f"--{name}", word]


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
