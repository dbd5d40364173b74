"""The options of a run as the page stores them: the values that differ from the defaults, by group and field.

They are checked before a run starts. The same values become the recipe's options, the flags of its command, and the form.
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

# Options that refer to files, models or services of the machine, or publish something; guests may not set them.
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
# Options that the app sets, and the token, which must not appear in a command on the page.
NEVER = frozenset({"output_dir", "resume_from_checkpoint", "hub_token"})
# Options that belonged to another group in an earlier version.
MOVED = {("optimisation", "lora_plus_ratio"): "adapter"}
FOLDERS = frozenset({*IMAGES, "class_data_dir", "cache_dir"})
LARGEST, LONGEST, MOST = 2**31 - 1, 4000, 5000


def build(workspace: Workspace, task: Task, values: Mapping[str, Any]) -> Options:
    """The options of `task` with `values`, by group and field, in place of the defaults.

    Raises: InputError for a value that is unknown, invalid, or not allowed for the user of `workspace`.
    """
    return built(task, cleaned(workspace, task, values))


def built(task: Task, values: Values) -> Options:
    """The options of `task` with values from `cleaned`.

    Raises: InputError for an invalid value.
    """
    kind = kind_of(task)
    groups = groups_of(kind)
    try:
        return kind(**{name: groups[name](**fields) for name, fields in values.items()})
    except InputError:
        raise
    except ValueError as error:
        # Raised by a library rather than by our checks.
        raise InputError(str(error)) from error


def kind_of(task: str) -> type[Options]:
    """The class of the options of `task`.

    Raises: InputError if the task does not exist.
    """
    if task not in KINDS:
        raise InputError(f"The task must be one of {', '.join(KINDS)}, got {task!r}.")
    return KINDS[typing.cast(Task, task)]


def cleaned(workspace: Workspace, task: Task, values: Mapping[str, Any]) -> Values:
    """The entries of `values` that differ from the defaults, converted to the fields' types, with absolute paths.

    Raises: InputError for a value that is unknown, of the wrong type, or not allowed for the user of `workspace`.
    """
    groups = groups_of(kind_of(task))
    cleaned_values: Values = {}
    for group, fields in _in_current_groups(_table(values, "The options")).items():
        if group not in groups:
            raise InputError(f"The options have no group {group!r}. The groups are {', '.join(groups)}.")
        group_fields = fields_of(groups[group])
        for name, value in _table(fields, f"The group {group!r}").items():
            if name not in group_fields:
                near = difflib.get_close_matches(str(name), group_fields, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InputError(f"The group {group!r} has no option {name!r}.{hint}")
            typed = _absolute(workspace, name, _typed(name, group_fields[name], value))
            if typed != default_of(group_fields[name]):
                cleaned_values.setdefault(group, {})[name] = typed
    _check_access(workspace, cleaned_values)
    return cleaned_values


def _in_current_groups(values: dict[str, Any]) -> dict[str, Any]:
    """The options of a run or a draft of an earlier version, moved to their current groups."""
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
    """The default value of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def flags(task: Task, values: Values) -> list[str]:
    """The flags of the recipe's command for values from `cleaned`.

    Raises: InputError for a value that cannot be written on a command line.
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
    """The resolved options of a run (options.json) that differ from the defaults, to start another run from.

    Options that belong to that run only, and values that the recipe derives from the base model or the images, are left out.
    """
    kind = kind_of(task)
    groups = groups_of(kind)
    given: Values = {}
    for group, fields in resolved.items():
        group_fields = fields_of(groups[group]) if group in groups and isinstance(fields, dict) else {}
        for name in group_fields.keys() & fields.keys() - NEVER:
            if fields[name] is not None and fields[name] != default_of(group_fields[name]):
                given.setdefault(group, {})[name] = fields[name]
    return _without_derived(task, given)


def _without_derived(task: Task, given: Values) -> Values:
    """`given` without the values that the recipe would choose if they were not given."""
    complete = built(task, given).to_dict()
    for group, name in [(group, name) for group, fields in given.items() for name in fields]:
        fewer = {key: {k: v for k, v in fields.items() if (key, k) != (group, name)} for key, fields in given.items()}
        try:
            same = built(task, fewer).to_dict() == complete
        except InputError:
            continue
        if same:
            return _without_derived(task, {key: fields for key, fields in fewer.items() if fields})
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


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a mapping of names to values, got {value!r:.100}.")
    return value


def _typed(name: str, field: dataclasses.Field, value: Any) -> Any:
    """`value` converted to the field's type.

    Raises: InputError naming the field and the expected type.
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
        raise InputError(f"{name} must be a list of 1 to {MOST} values, got {value!r:.100}. Leave it out for the default.")
    # A list of strings, such as shots, may contain integers, because an item may also be "all".
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
        raise InputError(f"{name} must be a string of at most {LONGEST} characters, got {value!r:.100}.")
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{name} contains an invalid character (a null character or a lone surrogate). Type it again.")
    return value


READERS = {bool: _truth, int: _whole_number, float: _number, str: _text}


def _absolute(workspace: Workspace, name: str, value: Any) -> Any:
    """`value` as an absolute path if it is a folder, because the run may start in another working directory."""
    if name == "pretrained_model_name_or_path" and value is not None and is_built_in(value):
        return recorded_name(value)
    if value is None or not (name in FOLDERS or (name in BASE_MODELS and workspace.is_local and Path(value).exists())):
        return value
    return str(Path(value).expanduser().absolute())


def _check_access(workspace: Workspace, values: Values) -> None:
    """Raises: InputError for an option that only the app sets, or that guests may not set."""
    given = {name: value for fields in values.values() for name, value in fields.items()}
    for name in given.keys() & NEVER:
        raise InputError(f"{name} cannot be set: the app sets it for each run. Leave it out.")
    if given.get("data_dir") is not None and not Path(given["data_dir"]).is_dir():
        # A CSV file of paths could make the run read any file.
        raise InputError(f"data_dir must be a folder with one subfolder of images per class, got {given['data_dir']!r}.")
    if not workspace.is_local:
        _check_guest(workspace, given)


def _check_guest(workspace: Workspace, given: Mapping[str, Any]) -> None:
    """Raises: InputError for an option that guests may not set."""
    for name in sorted(given.keys() & MACHINE_FIELDS):
        if name in IMAGES:
            _check_own_images(workspace, name, Path(given[name]))
        elif name not in BASE_MODELS:
            raise InputError(f"{name} cannot be set on this server, because it refers to the server's machine. Leave it out.")
    named = given.get("pretrained_model_name_or_path") or _clip_name(given)
    if named is not None and named not in workspace.base_models:
        offered = ", ".join(["the built-in model", *workspace.base_models])
        raise InputError(f"This server does not offer the base model {named!r:.100}. It offers {offered}.")


def _clip_name(given: Mapping[str, Any]) -> str | None:
    """The name of a CLIP model and its weights in the server's list of base models; None for the built-in one."""
    if given.keys().isdisjoint({"model", "pretrained"}):
        return None
    return f"open_clip:{given.get('model')}/{given.get('pretrained')}"


def _check_own_images(workspace: Workspace, name: str, path: Path) -> None:
    if path.parent != workspace.sets.absolute() or workspace.image_set(path.name).absolute() != path:
        raise InputError(f"{name} must be a dataset that you uploaded here. Upload the images and start again.")
