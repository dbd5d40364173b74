"""The fields of the expert panel: every option of a task, from the dataclasses of its flags."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.adapter_options import MethodOption
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, REFERENCE, equation_of, method_names, title_of
from pipelines.optimizers import OPTIMIZERS
from training.options.command_line import groups_of
from training.options.fewshot import BASELINES
from training.options.optimisation import SCHEDULES
from webui.classifiers import method_name
from webui.draft import SET_BY_THE_PAGE
from webui.work.options import MACHINE_FIELDS, NEVER, Task, default_of, fields_of, kind_of

Kind = Literal["bool", "choice", "choices", "int", "float", "text", "list"]
# The default, the method that it is compared with, and the others by their names for people.
ORDERED_METHODS = (DEFAULT, REFERENCE, *sorted({*method_names()} - {DEFAULT, REFERENCE}, key=lambda name: title_of(name).lower()))
METHOD = "method"
# Text options with a fixed set of values.
CHOICES: dict[Task, dict[str, tuple[str, ...]]] = {
    "subject": {
        METHOD: ORDERED_METHODS,
        "lr_scheduler": SCHEDULES,
        "optimizer": tuple({"adamw": "AdamW", "prodigy": "Prodigy"}.get(name, name) for name in OPTIMIZERS),
    },
    "classify": {METHOD: (*BASELINES, *ORDERED_METHODS)},
}

LABEL_WORDS = {
    "8bit": "8-bit", "adam": "Adam", "beta1": "beta 1", "beta2": "beta 2", "dir": "folder", "edm": "EDM", "ema": "EMA",
    "gb": "(GB)", "grad": "gradient", "hub": "Hub", "id": "ID", "init": "initialisation", "lr": "learning rate",
    "max": "maximum", "min": "minimum", "num": "number of", "orth": "orthogonality", "reg": "regularisation", "rslora": "rsLoRA",
    "snr": "SNR", "train": "training", "vae": "VAE",
} | {name: title_of(name) for name in method_names()}  # fmt: skip
LABELS = {
    "adam_epsilon": "Adam epsilon",
    "dataloader_num_workers": "Data loader workers",
    "heldout_image": "Held-out image",
    "heldout_steps": "Validation loss every N steps",
    "lr_num_cycles": "Learning rate cycles",
    "lr_warmup_steps": "Warm-up steps",
    "num_class_images": "Number of class images",
    "pretrained_model_name_or_path": "Base model",
    "pretrained_vae_model_name_or_path": "VAE",
    "report_to": "Tracker",
    "snr_gamma": "Min-SNR gamma",
    "train_batch_size": "Batch size",
    "train_text_encoder": "Train text encoder",
    "validation_steps": "Sample images every N steps",
    "with_prior_preservation": "Prior preservation",
}


@dataclass(frozen=True)
class Field:
    """One option.

    Args:
        group, name: the dataclass and its field.
        kind: the kind of widget; a list has one item per line, and choices are several of a fixed set.
        item: the type of the value, or of the items of a list.
        choices: the values of a choice or of choices.
        optional: whether it may be empty.
        default: its default value.
        help: the help of its flag.
        methods: the adapter methods that have it; empty for an option of every run.
        method_label: the label that these methods give it; empty for one made from its name.
        help_texts: the help of an option of methods: texts, with the methods that each is about.
    """

    group: str
    name: str
    kind: Kind
    item: type
    choices: tuple[Any, ...]
    optional: bool
    default: Any
    help: str
    methods: tuple[str, ...] = ()
    method_label: str = ""
    help_texts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def help_for(self, methods: frozenset[str], value: Any) -> str:
        """The help, as far as it concerns a run that trains `methods`.

        Args:
            value: of the field.
        """
        if self.name == METHOD and self.choices:
            summary = f" {method_summary(value)}." if self.kind == "choice" and value in self.choices else ""
            return f"{self.help.partition(':')[0]}.{summary}"
        chosen = [(text, [name for name in names if name in methods]) for text, names in self.help_texts]
        relevant = [f"{', '.join(map(title_of, names))}: {text}" for text, names in chosen if names]
        return "; ".join(relevant) + "." if relevant else self.help

    def titled_choices(self) -> list[tuple[str, str]]:
        """The choices with their names for people."""
        return [(method_label(choice) if self.name == METHOD else str(choice), str(choice)) for choice in self.choices]

    @property
    def label(self) -> str:
        """Its name for people."""
        words = [LABEL_WORDS.get(word, word) for word in self.name.split("_")]
        return self.method_label or LABELS.get(self.name) or " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])

    def read(self, value: Any) -> Any:
        """The option's value from the widget's `value`; None if empty.

        Raises: InputError if it has the wrong type.
        """
        if self.kind == "bool":
            return bool(value)
        if self.kind == "choices" and isinstance(value, list):
            return [str(one) for one in value] or None
        if text := "" if value is None else str(value).strip():
            return self._read_text(text)
        if self.optional or self.kind in ("list", "choices"):
            return None
        raise InputError(f"{self.name} must not be empty. The previous value is kept.")

    def _read_text(self, text: str) -> Any:
        if self.kind in ("list", "choices"):
            return [self._number_or_text(line.strip()) for line in text.replace(",", "\n").splitlines() if line.strip()]
        if self.kind == "choice":
            return next((choice for choice in self.choices if str(choice) == text), text)
        return self._number_or_text(text)

    def show(self, value: Any) -> Any:
        """The widget's value for the option's `value`."""
        if self.kind == "bool":
            return bool(value)
        if self.kind == "choices":
            return list(value or ())
        if value is None:
            return None if self.kind == "choice" else ""
        if self.kind == "choice":
            return str(value)
        return "\n".join(map(_written, value)) if self.kind == "list" else _written(value)

    def _number_or_text(self, text: str) -> Any:
        if self.item is str:
            return text
        try:
            number = float(text)
        except ValueError as error:
            what = "a whole number" if self.item is int else "a number"
            raise InputError(f"{self.name} must be {what}, got {text[:40]!r}.") from error
        return int(number) if self.item is int and number.is_integer() else number


def panel_fields(task: Task, is_local: bool) -> dict[str, list[Field]]:
    """All options of `task` on the panel, by group.

    Args:
        is_local: whether the server runs on the user's machine; other users may not name its files and models.
    """
    hidden = NEVER if is_local else NEVER | MACHINE_FIELDS
    by_group: dict[str, list[Field]] = {}
    for group, kind in groups_of(kind_of(task)).items():
        by_the_page = SET_BY_THE_PAGE[task].get(group, ())
        names = [name for name in fields_of(kind) if name not in hidden and name not in by_the_page]
        of_methods = getattr(kind, "method_options", {})
        by_group[group] = [_field(task, group, fields_of(kind)[name], of_methods.get(name)) for name in names]
    return {group: fields for group, fields in by_group.items() if fields}


def _field(task: Task, group: str, field: dataclasses.Field, of_methods: MethodOption | None) -> Field:
    kind, optional = _without_none(field.type)
    offered = CHOICES[task].get(field.name, ()) if of_methods is None else of_methods.choices
    widget, item, choices = _widget(kind, optional, offered if kind in (str, list[str]) else ())
    option = MethodOption((), ()) if of_methods is None else of_methods
    words = str(field.metadata.get("help", ""))
    return Field(
        group,
        field.name,
        widget,
        item,
        choices,
        optional,
        default_of(field),
        words,
        option.methods,
        option.label,
        option.help_texts,
    )


def _without_none(kind: Any) -> tuple[Any, bool]:
    """The type without None, and whether it allows None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(one for one in typing.get_args(kind) if one is not type(None)), True
    return kind, False


def _widget(kind: Any, optional: bool, choices: tuple[Any, ...]) -> tuple[str, type, tuple[Any, ...]]:
    """The kind of widget for an option of the type `kind`, the type of one value, and the values to choose from."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "choice", type(arguments[0]), arguments
    if kind is bool and optional:
        # Three values: true, false and not set.
        return "choice", bool, (True, False)
    if typing.get_origin(kind) is list:
        return "choices" if choices else "list", arguments[0], choices
    return "choice" if choices else {bool: "bool", int: "int", float: "float", str: "text"}[kind], kind, choices


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def method_label(name: str) -> str:
    """The name of an adapter method or of a baseline for people."""
    return method_name(name)


def method_summary(name: str) -> str:
    """The title of an adapter method, and its equation in words of its file."""
    return f"{title_of(name)}: {equation_of(name)}"
