"""The methods of an arena: a method's name, and options that differ from its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import InputError
from pipelines.fewshot.baselines import BASELINES
from pipelines.methods import method_named, method_names
from pipelines.run_options import Task
from training.options.arena import ALL

RATE = "learning_rate"


@dataclass(frozen=True)
class MethodVariant:
    """A method with options.

    Args:
        label: as it was given, such as "nora:basis=gradient".
        method: the method's name.
        options: names and values of options.
    """

    label: str
    method: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, label: str) -> MethodVariant:
        """The variant written as name or name:option=value,option=value.

        Raises: InputError for an unknown method, or an option that is not written so.
        """
        method, _, text = label.partition(":")
        if method not in BASELINES and method not in method_names():
            names = ", ".join((*BASELINES, *method_names()))
            raise InputError(f"methods must each begin with one of {names}, got {label!r}.")
        pairs = [part.partition("=") for part in text.split(",")] if text else []
        if wrong := ["".join(pair) for pair in pairs if not (pair[0].isidentifier() and pair[1] and pair[2])]:
            raise InputError(f"The options in methods must be written as name:option=value,option=value, got {wrong[0]!r}.")
        return cls(label, method, tuple((name, value) for name, _, value in pairs))

    @property
    def is_baseline(self) -> bool:
        """Whether it classifies frozen features, without a learning rate of the recipe."""
        return self.method in BASELINES

    @property
    def fixed_rate(self) -> float | None:
        """The learning rate among its options; it is then not swept. None without one."""
        return next((float(value) for name, value in self.options if name == RATE), None)

    @property
    def starts_at_base(self) -> bool:
        """Whether its training is known to start at the base model: options other than the rate may change the start."""
        has_options = any(name != RATE for name, _ in self.options)
        return not (self.is_baseline or has_options) and method_named(self.method).starts_at_base

    def flags(self) -> list[str]:
        """Its flags, without the learning rate."""
        return ["--method", self.method, *(word for n, value in self.options if n != RATE for word in (f"--{n}", value))]

    def runs_on(self, task: Task) -> bool:
        """Whether it is a method of `task`; baselines classify only."""
        return task == "few-shot" or not self.is_baseline


def variants_of(labels: Sequence[str]) -> list[MethodVariant]:
    """The variants of the labels, of which `all` stands for every method that is not given by itself."""
    expanded = [name for label in labels for name in ([*BASELINES, *method_names()] if label == ALL else [label])]
    return [MethodVariant.parse(label) for label in dict.fromkeys(expanded)]
