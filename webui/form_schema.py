"""The options of a task as fields of a form, and their values as they come from a browser: typed, limited, and allowed.

The dataclasses that make the flags of a command make the fields too. A field that is empty keeps the value of the preset or the
default, so a form has no values but those that the user entered.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
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
from pipelines.methods import DEFAULT, REFERENCE, equation_of, method_names, title_of
from pipelines.optimizers import OPTIMIZERS
from training.options.command_line import groups_of
from training.options.fewshot import BASELINES
from training.options.optimisation import SCHEDULES
from training.options.values import Options, Values, built, default_of, groups, kind_of
from webui.classifiers import method_name
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
        "optimizer": tuple({"adamw": "AdamW", "prodigy": "Prodigy"}.get(name, name) for name in OPTIMIZERS),
    },
    "classify": {METHOD: (*BASELINES, *ORDERED_METHODS)},
}
GROUP_TITLES = {
    "model": "Base model", "data": "Images and prompts", "adapter": "Adapter", "target_layers": "Target layers",
    "method": "Methods", "optimisation": "Training", "output": "Checkpoints and output", "validation": "Validation",
}  # fmt: skip
LABEL_WORDS = {
    "8bit": "8-bit", "adam": "Adam", "beta1": "beta 1", "beta2": "beta 2", "d": "initial d", "dir": "folder", "edm": "EDM",
    "ema": "EMA", "grad": "gradient", "hub": "Hub", "id": "ID", "init": "initial", "lr": "learning rate", "max": "maximum",
    "min": "minimum", "niter": "iterations", "num": "number of", "orth": "orthogonality", "reg": "regularisation",
    "rslora": "rsLoRA", "snr": "SNR", "train": "training", "tfinal": "final", "tinit": "initial", "topk": "top k", "vae": "VAE",
} | {name: title_of(name) for name in method_names()}  # fmt: skip
LABELS = {
    "adam_epsilon": "Adam epsilon", "adam_weight_decay": "Weight decay", "beta1": "Sensitivity smoothing (beta 1)",
    "beta2": "Uncertainty smoothing (beta 2)", "cache_dir": "Cache folder",
    "certify": "Verify exported files with diffusers", "checkpointing_steps": "Save a checkpoint every",
    "checkpoints_total_limit": "Checkpoints to keep", "center_crop": "Centre crop",
    "class_data_dir": "Folder of class images", "d_initial": "Initial scale d",
    "dataloader_num_workers": "Image decoding processes", "delta_t": "Reallocate ranks every",
    "do_edm_style_training": "EDM-style loss", "encoders": "Encoders to adapt",
    "gradient_accumulation_steps": "Gradient accumulation", "gradient_checkpointing": "Gradient checkpointing",
    "heldout_image": "Held-out image", "heldout_steps": "Measure the validation loss every",
    "hub_model_id": "Hub repository", "image_scorer": "Image scorer", "init_r": "Initial rank",
    "iterations_per_shot": "Steps per training image of a class", "inner_init": "Inner initialisation",
    "layers": "Attention layers", "learning_rate": "Learning rate", "lr_num_cycles": "Restarts",
    "lr_power": "Power of the schedule", "lr_scheduler": "Learning rate schedule", "lr_warmup_steps": "Warm-up",
    "max_grad_norm": "Gradient clipping", "max_train_steps": "Training steps",
    "memory_fallback": "Fit into memory automatically", "memory_limit_gb": "Memory limit", "method": "Adapter method",
    "min_train_steps": "Minimum training steps", "model": "Base model", "noise_offset": "Noise offset",
    "num_candidate_images": "Checkpoints compared by their images", "num_class_images": "Class images",
    "pretrained": "Weights", "pretrained_model_name_or_path": "Base model", "pretrained_vae_model_name_or_path": "VAE",
    "prior_generation_precision": "Precision of the class images",
    "private": "Leave personal details out of published files", "push_to_hub": "Upload to the Hugging Face hub",
    "quantize": "Quantisation", "random_flip": "Random horizontal flips", "report_to": "Tracker",
    "rescale_betas_zero_snr": "Zero terminal SNR", "sample_batch_size": "Batch size of class images",
    "shots": "Images per class", "single_file_config": "Configuration for a single file", "snr_gamma": "Min-SNR gamma",
    "stop_text_encoder_training": "Train the text encoders for", "target_r": "Final rank",
    "test_share": "Share of test images", "text_encoder_lr": "Learning rate of the text encoders",
    "theta_d_length": "Length of the shared vector", "train_batch_size": "Batch size",
    "train_text_encoder": "Train the text encoders", "u": "Size of the shared vector (u)", "use_8bit_adam": "8-bit AdamW",
    "use_ema": "Moving average of the adapter (EMA)", "validation_steps": "Generate images every",
    "views": "Augmented views", "with_prior_preservation": "Prior preservation",
}  # fmt: skip
UNITS = {
    **dict.fromkeys(
        (
            "max_train_steps", "min_train_steps", "lr_warmup_steps", "stop_text_encoder_training", "heldout_steps",
            "checkpointing_steps", "validation_steps", "iterations_per_shot", "delta_t",
        ),
        "steps",
    ),
    **dict.fromkeys(("train_batch_size", "sample_batch_size", "num_class_images"), "images"),
    "gradient_accumulation_steps": "batches", "memory_limit_gb": "GB", "resolution": "pixels", "crops_per_image": "per image",
    "gradient_batches": "batches", "parameter_budget": "parameters",
}  # fmt: skip


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
LIMITED = {
    bool: bool,
    int: Annotated[int, *NUMBER],
    float: Annotated[float, *NUMBER, Limits(allow_inf_nan=False)],
    str: Annotated[str, Limits(max_length=LONGEST), AfterValidator(_printable)],
}


@cache
def _adapter(kind: Any) -> TypeAdapter:
    # Numbers such as the 16 in shots may be texts, because an item may also be "all".
    return TypeAdapter(_limited(kind), config=ConfigDict(coerce_numbers_to_str=True))


def _limited(kind: Any) -> Any:
    """The type of an option with limits on the size of its values."""
    kind, is_optional = without_none(kind)
    if typing.get_origin(kind) is list:
        kind = Annotated[list[LIMITED[typing.get_args(kind)[0]]], Limits(min_length=1, max_length=MOST)]
    limited = LIMITED.get(kind, kind) if isinstance(kind, type) else kind
    return limited | None if is_optional else limited


def without_none(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether it allows None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(one for one in typing.get_args(kind) if one is not type(None)), True
    return kind, False


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
        raise InputError(f"{named(field.name)} {verb}{sentence}, got {first['input']!r:.100}.") from error


def named(name: str) -> str:
    """An option in a sentence: its label and its flag."""
    return f"{label_of(name)} (--{name})"


def explained(task: str, error: InputError) -> tuple[str, str]:
    """The option that an error of `built` is about, and the sentence with its label; the option is empty if it is about none."""
    first, _, rest = str(error).partition(" ")
    is_option = any(first in fields for fields in groups(task).values())
    return (first, f"{named(first)} {rest}") if is_option else ("", str(error))


def checked(workspace: Workspace, task: str, values: Mapping[str, Any]) -> Values:
    """The entries of `values` that differ from the defaults, with the types of the options and absolute paths.

    Raises: InputError for a value that is unknown, of the wrong type, or not allowed for the user of `workspace`.
    """
    result: Values = {}
    for group, fields in with_current_names(_table(values, "The options")).items():
        options = _known("The options have no group", group, groups(task))
        for name, value in _table(fields, f"The group {group!r}").items():
            option = _known(f"The group {group!r} has no option", name, options)
            converted = _absolute(workspace, name, typed(option, value))
            if converted != default_of(option):
                result.setdefault(group, {})[name] = converted
    _check_access(workspace, result)
    return result


def validated(workspace: Workspace, task: str, values: Mapping[str, Any]) -> tuple[Values, Options]:
    """`checked` values, and the options that they make. Raises: InputError for an invalid value or combination."""
    given = checked(workspace, task, values)
    try:
        return given, built(task, given)
    except InputError as error:
        raise InputError(explained(task, error)[1]) from error


def _known(sentence: str, name: str, among: Mapping[str, Any]) -> Any:
    if name not in among:
        near = difflib.get_close_matches(str(name), among, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{sentence} {name!r}.{hint}")
    return among[name]


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{what} must be a mapping of names to values, got {value!r:.100}.")
    return value


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
    for name in sorted(given.keys() & MACHINE_FIELDS):
        if name in IMAGES:
            _check_own_images(workspace, name, Path(given[name]))
        elif name not in BASE_MODELS:
            raise InputError(f"{name} cannot be set on this server, because it refers to the server's machine. Leave it out.")
    named_model = given.get("pretrained_model_name_or_path") or _clip_name(given)
    if named_model is not None and named_model not in workspace.base_models:
        offered = ", ".join(["the built-in model", *workspace.base_models])
        raise InputError(f"This server does not offer the base model {named_model!r:.100}. It offers {offered}.")


def _clip_name(given: Mapping[str, Any]) -> str | None:
    """The name of a CLIP model and its weights in the server's list of base models; None for the built-in one."""
    if given.keys().isdisjoint({"model", "pretrained"}):
        return None
    return f"open_clip:{given.get('model')}/{given.get('pretrained')}"


def _is_bundled(path: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(ASSETS.resolve())


def _check_own_images(workspace: Workspace, name: str, path: Path) -> None:
    if _is_bundled(path):
        return
    if path.parent != workspace.sets.absolute() or workspace.image_set(path.name).absolute() != path:
        raise InputError(f"{name} must be a dataset that you uploaded here. Upload the images and start again.")


@dataclass(frozen=True)
class FormField:
    """One option in a form.

    Args:
        group, name: the dataclass and its field.
        kind: the kind of widget; a list has one item per line, and choices are several of a fixed set.
        choices: titles and values to choose from.
        default: the default as text; empty if the trainer decides.
        help: the help of its flag.
        methods: the adapter methods that have it; empty for an option of every run.
        label: its name for people.
        help_texts: the help of an option of methods: texts, with the methods that each is about.
    """

    group: str
    name: str
    kind: Literal["choice", "choices", "int", "float", "text", "list", "numbers"]
    choices: tuple[tuple[str, str], ...]
    default: str
    help: str
    methods: tuple[str, ...]
    label: str
    help_texts: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def unit(self) -> str:
        """The unit of its value; empty for none."""
        return UNITS.get(self.name, "")


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
    option = of_methods or MethodOption((), ())
    kind, _ = without_none(field.type)
    widget, choices = _widget(kind, option.choices if of_methods else CHOICES[task].get(field.name, ()))
    # The labels of methods name the method and the option; the form has both already.
    of_method = re.sub(rf"^.*\b{field.name} \(", f"{label_of(field.name)} (", option.label)
    label = "Methods" if widget == "choices" and field.name == METHOD else of_method or label_of(field.name)
    text = str(field.metadata.get("help", ""))
    words = f"{text.partition(':')[0]}." if field.name == METHOD else text
    default = written(default_of(field))
    return FormField(group, field.name, widget, choices, default, words, option.methods, label, option.help_texts)


def _widget(kind: Any, texts: tuple[str, ...]) -> tuple[Any, tuple[tuple[str, str], ...]]:
    """The kind of widget for an option of the type `kind`, and the titles and values to choose from."""
    arguments = typing.get_args(kind)
    if kind is bool:
        return "choice", (("on", "true"), ("off", "false"))
    if typing.get_origin(kind) is Literal:
        return "choice", tuple((str(one), str(one)) for one in arguments)
    if texts and kind in (str, list[str]):
        return "choice" if kind is str else "choices", tuple((method_label(one), one) for one in texts)
    if typing.get_origin(kind) is list:
        return "list" if arguments[0] is str else "numbers", ()
    return {int: "int", float: "float", str: "text"}[kind], ()


def label_of(name: str) -> str:
    """The name of an option for people."""
    words = [LABEL_WORDS.get(word, word) for word in name.split("_")]
    return LABELS.get(name) or " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def written(value: Any) -> str:
    """A value of an option as text; empty for None."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(written, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "" if value is None else method_label(str(value))


def method_label(name: str) -> str:
    """The title of an adapter method or a baseline; any other text as it is."""
    return method_name(name) if name in ORDERED_METHODS or name in BASELINES else name


def method_summary(name: str) -> str:
    """The title of an adapter method and its equation, in the words of its file."""
    return f"{title_of(name)}: {equation_of(name)}" if name in method_names() else ""
