"""A run's options as the page has them: only what differs from the defaults, by group and field, checked before anything starts.

The same values are a recipe's options, the flags of its command, and what the page shows.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipelines.built_in import is_built_in, recorded_name
from pipelines.deprecated_flags import with_current_names
from pipelines.errors import InputError
from training.options import SubjectOptions
from training.options.command_line import groups_of
from training.options.fewshot import FewShotOptions
from webui.workspace import Workspace

Task = Literal["subject", "classify"]
Options = SubjectOptions | FewShotOptions
Values = dict[str, dict[str, Any]]
KINDS: dict[Task, type[Options]] = {"subject": SubjectOptions, "classify": FewShotOptions}

# What names files, models or services of the machine, or publishes: nothing for those who are only guests on it.
IMAGES = frozenset({"instance_data_dir", "data_dir"})
BASE_MODELS = frozenset({"pretrained_model_name_or_path", "model", "pretrained"})
MACHINE_FIELDS = frozenset(
    {
        *IMAGES, *BASE_MODELS, "class_data_dir", "cache_dir", "dataset", "dataloader_num_workers",
        "pretrained_vae_model_name_or_path", "revision", "variant", "single_file_config",
        "output_dir", "resume_from_checkpoint", "report_to", "export",
        "image_scorer", "push_to_hub", "hub_model_id", "hub_token",
    }
)  # fmt: skip
# Set by the app; and a token has no place in a command that is shown.
NEVER = frozenset({"output_dir", "resume_from_checkpoint", "hub_token"})
# Options that were of another group once.
MOVED = {("optimisation", "lora_plus_ratio"): "adapter"}
FOLDERS = frozenset({*IMAGES, "class_data_dir", "cache_dir"})
LARGEST, LONGEST, MOST = 2**31 - 1, 4000, 5000


def build(workspace: Workspace, task: Task, values: Mapping[str, Any]) -> Options:
    """The options of `task` with `values`, by group and field, besides the defaults.

    Raises: InputError naming what is unknown, wrong, or not for whoever works in `workspace`.
    """
    return built(task, cleaned(workspace, task, values))


def built(task: Task, values: Values) -> Options:
    """The options of `task` with values that are `cleaned`.

    Raises: InputError naming a value that cannot be used.
    """
    kind = kind_of(task)
    groups = groups_of(kind)
    try:
        return kind(**{name: groups[name](**fields) for name, fields in values.items()})
    except InputError:
        raise
    except ValueError as error:
        # What a library refuses in its own words.
        raise InputError(str(error)) from error


def kind_of(task: str) -> type[Options]:
    """The options of `task`.

    Raises: InputError if there is no such task.
    """
    if task not in KINDS:
        raise InputError(f"The task must be one of {', '.join(KINDS)}, got {task!r}.")
    return KINDS[typing.cast(Task, task)]


def cleaned(workspace: Workspace, task: Task, values: Mapping[str, Any]) -> Values:
    """What of `values` differs from the defaults, with the types of the fields and whole paths.

    Raises: InputError naming what is unknown, of a wrong type, or not for whoever works in `workspace`.
    """
    groups = groups_of(kind_of(task))
    cleaned_values: Values = {}
    for group, fields in _in_todays_groups(_table(values, "The options")).items():
        if group not in groups:
            raise InputError(f"There is no group of options called {group!r}. There are {', '.join(groups)}.")
        group_fields = fields_of(groups[group])
        for name, value in _table(fields, f"The group {group!r}").items():
            if name not in group_fields:
                near = difflib.get_close_matches(str(name), group_fields, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InputError(f"The group {group!r} has no option {name!r}.{hint}")
            typed = _whole_path(workspace, name, _typed(name, group_fields[name], value))
            if typed != default_of(group_fields[name]):
                cleaned_values.setdefault(group, {})[name] = typed
    _check_access(workspace, cleaned_values)
    return cleaned_values


def _in_todays_groups(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a run or a draft from before some moved, each in its group of today."""
    groups = {
        group: dict(fields) if isinstance(fields, Mapping) else fields for group, fields in with_current_names(values).items()
    }
    for (before, name), now in MOVED.items():
        if isinstance(groups.get(before), dict) and name in groups[before]:
            groups.setdefault(now, {}).setdefault(name, groups[before].pop(name))
    return groups


def fields_of(group: type) -> dict[str, dataclasses.Field]:
    """The fields of a group of options by name, with their types resolved."""
    hints = typing.get_type_hints(group)
    fields = {}
    for field in dataclasses.fields(group):
        field.type = hints[field.name]
        fields[field.name] = field
    return fields


def default_of(field: dataclasses.Field) -> Any:
    """What a field is unless something is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flags(task: Task, values: Values) -> list[str]:
    """Values that are `cleaned` as flags of the recipe's command, which reads the same options from them.

    Raises: InputError for one that a command line cannot say.
    """
    groups = groups_of(kind_of(task))
    words: list[str] = []
    for group, fields in values.items():
        group_fields = fields_of(groups[group])
        for name, value in fields.items():
            if value is False and default_of(group_fields[name]) is None:
                words += _pair(name, str(value))
            elif value != default_of(group_fields[name]):
                words += _flag(name, value)
    return words


def changed(task: Task, resolved: Mapping[str, Any]) -> Values:
    """What a run's resolved options, as options.json has them, say other than the defaults do, to start another run from.

    What belongs to that run alone is left out, and so is what its base model and its images decide by themselves.
    """
    kind = kind_of(task)
    groups = groups_of(kind)
    given: Values = {}
    for group, fields in resolved.items():
        group_fields = fields_of(groups[group]) if group in groups and isinstance(fields, dict) else {}
        for name in group_fields.keys() & fields.keys() - NEVER:
            if fields[name] is not None and fields[name] != default_of(group_fields[name]):
                given.setdefault(group, {})[name] = fields[name]
    return _without_the_decided(task, given)


def _without_the_decided(task: Task, given: Values) -> Values:
    """`given` without each value that is there anyway when it is not said."""
    complete = built(task, given).to_dict()
    for group, name in [(group, name) for group, fields in given.items() for name in fields]:
        fewer = {key: {k: v for k, v in fields.items() if (key, k) != (group, name)} for key, fields in given.items()}
        try:
            same = built(task, fewer).to_dict() == complete
        except InputError:
            continue
        if same:
            return _without_the_decided(task, {key: fields for key, fields in fewer.items() if fields})
    return given


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if not isinstance(value, list):
        return _pair(name, _word(value))
    items = [_word(item) for item in value]
    if len(items) > 1 and any(item.startswith("-") for item in items):
        wrong = next(item for item in items if item.startswith("-"))
        raise InputError(f"What is listed in {name} must not begin with a minus, got {wrong!r}. Begin it with a letter.")
    return _pair(name, items[0]) if len(items) == 1 else [f"--{name}", *items]


def _pair(name: str, word: str) -> list[str]:
    # With a space, a word that begins with a minus would be a flag.
    return [f"--{name}={word}"] if word.startswith("-") or not word else [f"--{name}", word]


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a table of values by name, got {value!r:.100}.")
    return value


def _typed(name: str, field: dataclasses.Field, value: Any) -> Any:
    """`value` as the field's type.

    Raises: InputError naming the field and what it takes.
    """
    kind = field.type
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if value is None:
            return None
        kind = next(one for one in arguments if one is not type(None))
        arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in arguments:
            raise InputError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}.")
        return value
    if typing.get_origin(kind) is list:
        return _listed(name, arguments[0], value)
    return READERS[kind](name, value)


def _listed(name: str, kind: type, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST:
        raise InputError(f"{name} must be a list of one to {MOST} values, got {value!r:.100}. Leave it out for the usual ones.")
    # Numbers of images are written as texts, since one of them may be "all".
    texts = kind is str
    return [READERS[kind](name, str(one) if texts and isinstance(one, int) and one is not True else one) for one in value]


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r:.100}.")
    return value


def _whole_number(name: str, value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST or int(value) != value:
        raise InputError(f"{name} must be a whole number up to {LARGEST}, got {value!r:.100}.")
    return int(value)


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= LARGEST or not math.isfinite(value):
        raise InputError(f"{name} must be a number up to {LARGEST}, got {value!r:.100}.")
    return float(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST:
        raise InputError(f"{name} must be a text of at most {LONGEST} characters, got {value!r:.100}.")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{name} holds a character that cannot be written down. Type it again.")
    return value


READERS = {bool: _truth, int: _whole_number, float: _number, str: _text}


def _whole_path(workspace: Workspace, name: str, value: Any) -> Any:
    """A folder as the run, which starts elsewhere, finds it."""
    if name == "pretrained_model_name_or_path" and value is not None and is_built_in(value):
        return recorded_name(value)
    if value is None or not (name in FOLDERS or (name in BASE_MODELS and workspace.is_local and Path(value).exists())):
        return value
    return str(Path(value).expanduser().absolute())


def _check_access(workspace: Workspace, values: Values) -> None:
    """Raises: InputError for what the app alone sets, and for what is not for guests on the machine."""
    given = {name: value for fields in values.values() for name, value in fields.items()}
    for name in given.keys() & NEVER:
        raise InputError(f"{name} is not set here: the app decides it for each run. Leave it out.")
    if given.get("data_dir") is not None and not Path(given["data_dir"]).is_dir():
        # A table of paths would have the run read any file.
        raise InputError(f"data_dir must be a folder with a folder of images for each class, got {given['data_dir']!r}.")
    if not workspace.is_local:
        _check_guest(workspace, given)


def _check_guest(workspace: Workspace, given: Mapping[str, Any]) -> None:
    """Raises: InputError for what is not for guests on the machine."""
    for name in sorted(given.keys() & MACHINE_FIELDS):
        if name in IMAGES:
            _check_own_images(workspace, name, Path(given[name]))
        elif name not in BASE_MODELS:
            raise InputError(f"{name} cannot be changed on this server: it names what belongs to its machine. Leave it out.")
    named = given.get("pretrained_model_name_or_path") or _clip_name(given)
    if named is not None and named not in workspace.base_models:
        offered = ", ".join(workspace.base_models) or "the built-in one alone"
        raise InputError(f"This server does not offer the base model {named!r:.100}; it offers {offered}.")


def _clip_name(given: Mapping[str, Any]) -> str | None:
    """A CLIP and its weights as the server's list of base models has them."""
    if given.keys().isdisjoint({"model", "pretrained"}):
        return None
    return f"open_clip:{given.get('model')}/{given.get('pretrained')}"


def _check_own_images(workspace: Workspace, name: str, path: Path) -> None:
    if path.parent != workspace.sets.absolute() or workspace.image_set(path.name).absolute() != path:
        raise InputError(f"{name} must be images that you have uploaded here. Add them, and start again.")
