"""The options of a task as fields of a form, and their values as they come from a browser: typed, limited, and allowed.

The dataclasses that make the flags of a command make the fields too. A field that is empty keeps the value of the preset or the
default, so a form has no values but those that the user entered.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Limits

from pipelines.adapter_options import MethodOption
from pipelines.built_in import ASSETS, is_built_in, recorded_name
from pipelines.deprecated_flags import with_current_names
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, REFERENCE, method_names, title_of
from pipelines.optimizers import OPTIMIZERS
from training.options.command_line import groups_of
from training.options.fewshot import BASELINES
from training.options.fewshot import OPTIMIZERS as FEWSHOT_OPTIMIZERS
from training.options.optimisation import SCHEDULES
from training.options.values import Options, Values, built, default_of, groups, kind_of
from training.runs.naming import method_name
from webui.workspace import Workspace

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
# Options with fields of their own on the page, which the form leaves out.
SET_BY_THE_PAGE: dict[str, dict[str, tuple[str, ...]]] = {
    "subject": {
        "data": ("instance_data_dir", "instance_prompt", "class_prompt"),
        "output": ("validation_prompt", "dry_run"),
    },
    "classify": {"data": ("data_dir", "dataset", "class_names")},
}
FOLDERS = frozenset({*IMAGES, "class_data_dir", "cache_dir"})
LARGEST, LONGEST, MOST = 2**31 - 1, 4000, 5000
METHOD = "method"
# The default, the method that it is compared with, and the others by their titles.
ORDERED_METHODS = (DEFAULT, REFERENCE, *sorted({*method_names()} - {DEFAULT, REFERENCE}, key=lambda name: title_of(name).lower()))
# Text options with a fixed set of values.
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "subject": {
        METHOD: ORDERED_METHODS,
        "lr_scheduler": SCHEDULES,
        "optimizer": OPTIMIZERS,
    },
    "classify": {METHOD: (*BASELINES, *ORDERED_METHODS), "optimizer": FEWSHOT_OPTIMIZERS},
}
WORDS = tomllib.loads(Path(__file__).with_name("form.toml").read_text(encoding="utf-8"))
GROUP_TITLES: dict[str, str] = WORDS["groups"]
UNITS: dict[str, str] = {name: unit for unit, names in WORDS["units"].items() for name in names}
LABEL_WORDS: dict[str, str] = WORDS["words"] | {name: title_of(name) for name in method_names()}


def _not_a_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _printable(text: str) -> str:
    # Pydantic refuses lone surrogates itself.
    if "\0" in text:
        raise ValueError("contains a null character")
    return text


NUMBER = (BeforeValidator(_not_a_truth_value), Limits(ge=-LARGEST, le=LARGEST))
LIMITED: dict[Any, Any] = {
    int: Annotated[int, *NUMBER],
    float: Annotated[float, *NUMBER],
    str: Annotated[str, AfterValidator(_printable)],
}
# Numbers such as the 16 in shots may be texts, because an item may also be "all".
LIMITS = ConfigDict(coerce_numbers_to_str=True, str_max_length=LONGEST, allow_inf_nan=False)


@cache
def _adapter(kind: Any) -> TypeAdapter:
    """Converts to the type of an option, within limits on the size of its values."""
    kind, is_optional = _without_none(kind)
    limited = LIMITED.get(kind, kind)
    if typing.get_origin(kind) is list:
        limited = Annotated[list[LIMITED[typing.get_args(kind)[0]]], Limits(min_length=1, max_length=MOST)]
    return TypeAdapter(limited | None if is_optional else limited, config=LIMITS)


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether it allows None."""
    types = [one for one in typing.get_args(kind) if one is not type(None)]
    return (types[0], True) if type(None) in typing.get_args(kind) else (kind, False)


def typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` converted to the type of an option.

    Raises: InputError naming the option, what is allowed and what was given.
    """
    try:
        return _adapter(field.type).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        sentence = re.sub(r"^(Value error, |(Input|String|List|Value) should )", "", first["msg"])
        verb = "" if first["type"] == "value_error" else "must "
        raise InputError(f"{_named(field.name)} {verb}{sentence}, got {first['input']!r:.100}.") from error


class OptionError(InputError):
    """An option has an invalid value.

    Args:
        option: its group and its name, as "data.shots".
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def checked(workspace: Workspace, task: str, values: Mapping[str, Any]) -> Values:
    """The entries of `values` that differ from the defaults, with the types of the options and absolute paths.

    Raises: InputError for a value that is unknown, of the wrong type, or not allowed for the user of `workspace`.
    """
    if not isinstance(values, Mapping) or not all(isinstance(fields, Mapping) for fields in values.values()):
        raise InputError(
            f'The options must be a mapping by group and name, as in {{"data": {{"seeds": [0]}}}}, got {values!r:.100}.'
        )
    result, by_group = {}, groups(task)
    for group, fields in with_current_names(values).items():
        options = _known("The options have no group", group, by_group)
        for name, value in fields.items():
            option = _known(f"The group {group!r} has no option", name, options)
            converted = _absolute(workspace, name, typed(option, value))
            if converted != default_of(option):
                result.setdefault(group, {})[name] = converted
    _check_access(workspace, result)
    return result


def validated(workspace: Workspace, task: str, values: Mapping[str, Any]) -> tuple[Values, Options]:
    """`checked` values, and the options that they make.

    Raises: InputError for an invalid value or combination, OptionError if it is about one option.
    """
    given = checked(workspace, task, values)
    try:
        return given, built(task, given)
    except InputError as error:
        # The recipes name an option by its flag; people know it by its label.
        name, _, rest = str(error).partition(" ")
        group = next((group for group, fields in groups(task).items() if name in fields), None)
        if group is None:
            raise
        raise OptionError(f"{group}.{name}", f"{_named(name)} {rest}") from error


def _named(name: str) -> str:
    """An option in a sentence: its label and its flag."""
    return f"{label_of(name)} (--{name})"


def _known(sentence: str, name: str, among: Mapping[str, Any]) -> Any:
    if name not in among:
        near = difflib.get_close_matches(str(name), among, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{sentence} {name!r}.{hint}")
    return among[name]


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
    data_dir = given.get("data_dir")
    if data_dir is not None and not Path(data_dir).is_dir() and not _is_bundled(data_dir):
        # A CSV file of paths could make the run read any file.
        raise InputError(f"data_dir must be a folder with one subfolder of images per class, got {data_dir!r}.")
    if not workspace.is_local:
        _check_guest(workspace, given)


def _check_guest(workspace: Workspace, given: Mapping[str, Any]) -> None:
    """Raises: InputError for an option that guests may not set."""
    for name in sorted(given.keys() & (MACHINE_FIELDS - BASE_MODELS)):
        if name not in IMAGES:
            raise InputError(f"{name} cannot be set on this server, because it refers to the server's machine. Leave it out.")
        if not _is_bundled(given[name]):
            if not workspace.is_image_set(given[name]):
                raise InputError(f"{name} must be a dataset that you uploaded here. Upload the images and start again.")
            workspace.image_set(Path(given[name]).name)
    named_model = given.get("pretrained_model_name_or_path")
    if named_model is None and not given.keys().isdisjoint({"model", "pretrained"}):
        # As the server's list of base models names a CLIP model and its weights.
        named_model = f"open_clip:{given.get('model')}/{given.get('pretrained')}"
    if named_model is not None and named_model not in workspace.base_models:
        offered = ", ".join(["the built-in model", *workspace.base_models])
        raise InputError(f"This server does not offer the base model {named_model!r:.100}. It offers {offered}.")


def _is_bundled(path: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(ASSETS.resolve())


@dataclass(frozen=True)
class FormField:
    """One option in a form.

    Args:
        group, name: the dataclass and its field.
        kind: the kind of widget; a list has one item per line, and choices are several of a fixed set.
        choices: titles and values to choose from.
        label: its name for people.
        unit: of its value; empty for none.
        help: the help of its flag.
        methods: the adapter methods that have it; empty for an option of every run.
        help_texts: the help of an option of methods: texts, with the methods that each is about.
    """

    group: str
    name: str
    kind: Literal["choice", "choices", "int", "float", "text", "list", "numbers"]
    choices: tuple[tuple[str, str], ...]
    label: str
    unit: str
    help: str
    methods: tuple[str, ...]
    help_texts: tuple[tuple[str, tuple[str, ...]], ...]


@cache
def form_fields(task: str, is_local: bool) -> dict[str, list[FormField]]:
    """The fields of the form of `task` by group.

    Args:
        is_local: whether the server runs on the user's machine; other users may not name its files and models.
    """
    hidden = NEVER if is_local else NEVER | MACHINE_FIELDS
    form: dict[str, list[FormField]] = {}
    for group, kind in groups_of(kind_of(task)).items():
        by_the_page, of_methods = SET_BY_THE_PAGE[task].get(group, ()), getattr(kind, "method_options", {})
        options = {name: option for name, option in groups(task)[group].items() if name not in hidden and name not in by_the_page}
        form[group] = [_form_field(task, group, option, of_methods.get(name)) for name, option in options.items()]
    return {group: fields for group, fields in form.items() if fields}


def _form_field(task: str, group: str, field: dataclasses.Field, of_methods: MethodOption | None) -> FormField:
    name, option = field.name, of_methods or MethodOption((), CHOICES[task].get(field.name, ()))
    kind, choices = _widget(_without_none(field.type)[0], option.choices)
    # The labels of methods name the method and the option; the form has both already.
    label = re.sub(rf"^.*\b{name} \(", f"{label_of(name)} (", option.label) or label_of(name)
    text = str(field.metadata.get("help", ""))
    if name == METHOD:
        label, text = "Methods" if kind == "choices" else label, f"{text.partition(':')[0]}."
    return FormField(group, name, kind, choices, label, UNITS.get(name, ""), text, option.methods, option.help_texts)


def _widget(kind: Any, texts: tuple[str, ...]) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The kind of widget for an option of the type `kind`, and the titles and values to choose from."""
    arguments = typing.get_args(kind)
    if kind is bool:
        return "choice", (("on", "true"), ("off", "false"))
    if typing.get_origin(kind) is Literal:
        return "choice", tuple((str(one), str(one)) for one in arguments)
    if texts and kind in (str, list[str]):
        return "choice" if kind is str else "choices", tuple((written(one), one) for one in texts)
    return {int: "int", float: "float", str: "text", list[str]: "list"}.get(kind, "numbers"), ()


def label_of(name: str) -> str:
    """The name of an option for people."""
    words = " ".join(LABEL_WORDS.get(word, word) for word in name.split("_"))
    return WORDS["labels"].get(name) or words[:1].upper() + words[1:]


def written(value: Any) -> str:
    """A value of an option as text, methods by their titles; empty for None."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if value in ORDERED_METHODS or value in BASELINES:
        return method_name(value)
    return "" if value is None else str(value)
