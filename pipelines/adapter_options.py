"""The flags of all adapter methods, built from the methods' own options; no method is named here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from pipelines.adapter_method import AdapterMethod
from pipelines.errors import InputError
from pipelines.methods import AUTO, DEFAULT, method_named, method_names, title_of
from pipelines.run_options import Task

Group = TypeVar("Group", bound=type)


def flag_of(option: dataclasses.Field, task: Task) -> str:
    """The name of an option's flag on `task`."""
    return option.metadata.get(task, option.name)


def with_method_options(task: Task) -> Callable[[Group], Group]:
    """A class decorator that adds the options of all methods to a dataclass of flags for `task`.

    Options of the same name become one field. If its default depends on the method or the base model, the field is None until
    `fill_in` sets it. The class attribute `method_options` holds the `MethodOption` of each of these fields.
    """

    def decorate(group: Group) -> Group:
        users = _users_by_flag(task)
        namespace = {
            "__doc__": group.__doc__,
            "__module__": group.__module__,
            "__qualname__": group.__qualname__,
            "method_options": {name: MethodOption.of(task, of_name) for name, of_name in users.items()},
        }
        fields = [_flag(task, name, of_name) for name, of_name in users.items()]
        return dataclasses.make_dataclass(group.__name__, fields, bases=(group,), namespace=namespace)

    return decorate


Users = list[tuple[type[AdapterMethod], dataclasses.Field, Any]]


@dataclass(frozen=True)
class MethodOption:
    """An option of one or several methods.

    Args:
        methods: the names of the methods that have it.
        choices: the allowed values; empty for any value.
        label: its label in a form; empty for one made from its name.
        help_texts: its help, with the names of the methods that each text is about.
    """

    methods: tuple[str, ...]
    choices: tuple[str, ...]
    label: str = ""
    help_texts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, task: Task, users: Users) -> MethodOption:
        """The option as `users` declare it; the first label counts."""
        choices = dict.fromkeys(choice for _, option, _ in users for choice in option.metadata.get("choices", ()))
        label = next(filter(None, (option.metadata.get("label") for _, option, _ in users)), "")
        texts = tuple((text, tuple(names)) for text, names in _help_texts(task, users).items())
        return cls(tuple(method.name for method, *_ in users), tuple(choices), label, texts)


def _typed_fields(kind: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(kind)
    return [(option, hints[option.name]) for option in dataclasses.fields(kind)]


def _users_by_flag(task: Task) -> dict[str, Users]:
    """For each flag, the methods that have it, with their option and its type."""
    users: dict[str, Users] = {}
    for name in (DEFAULT, *(name for name in method_names() if name != DEFAULT)):
        method = method_named(name)
        for option, hint in _typed_fields(method.Options):
            users.setdefault(flag_of(option, task), []).append((method, option, hint))
    return users


def _flag(task: Task, name: str, users: Users) -> tuple[str, Any, Any]:
    """The dataclass field for an option of `users`.

    Raises: TypeError if they declare it with different types.
    """
    hints = {hint for _, _, hint in users}
    if len(hints) > 1:
        raise TypeError(
            f"The option {name!r} has different types in the methods {', '.join(m.name for m, *_ in users)}: {hints}."
        )
    defaults = {_default(option) for _, option, _ in users}
    depends_on_task = any(option.name in _task_defaults(method, task) for method, option, _ in users)
    metadata = {"help": _help(task, users)}
    hint = hints.pop()
    if len(defaults) > 1 or depends_on_task:
        return name, hint | None, field(default=None, metadata=metadata)
    return name, hint, field(default=defaults.pop(), metadata=metadata)


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _default_of(method: type[AdapterMethod], option: dataclasses.Field, task: Task, built_in: bool) -> Any:
    return method.defaults(task, built_in).options.get(option.name, _default(option))


def _task_defaults(method: type[AdapterMethod], task: Task) -> dict[str, Any]:
    """The defaults of a method on `task`; those for full-width models replace those for the built-in one."""
    return {**method.defaults(task, True).options, **method.defaults(task, False).options}


def _help_texts(task: Task, users: Users) -> dict[str, list[str]]:
    """The help texts of `users`, each with its default, and the names of the methods that have it."""
    texts: dict[str, list[str]] = {}
    for method, option, _ in users:
        value = _task_defaults(method, task).get(option.name)
        default = "" if value is None else f" (default: {value})"
        texts.setdefault(f"{option.metadata['help']}{default}", []).append(method.name)
    return texts


def _help(task: Task, users: Users) -> str:
    """The help texts of `users`, each with the titles of the methods that have it."""
    texts = _help_texts(task, users)
    return "; ".join(f"{', '.join(map(title_of, names))}: {text}" for text, names in texts.items()) + "."


def fill_in(options: Any, task: Task, built_in: bool, methods: Iterable[str]) -> None:
    """Set each option of `methods` that was not given to its default on `task`, unless the methods differ in it."""
    defaults: dict[str, set[Any]] = {}
    for method in map(method_named, methods):
        for option in dataclasses.fields(method.Options):
            defaults.setdefault(flag_of(option, task), set()).add(_default_of(method, option, task, built_in))
    for flag, values in defaults.items():
        if getattr(options, flag) is None and len(values) == 1:
            setattr(options, flag, values.pop())


def options_of(options: Any, task: Task, built_in: bool, method: str) -> dict[str, Any]:
    """The values of the options of `method`, by their names in its `Options`; those not given have the method's defaults.

    Raises: InputError naming the flag if a value is infinite or NaN.
    """
    kind, values = method_named(method), {}
    for option in dataclasses.fields(kind.Options):
        value = getattr(options, flag_of(option, task))
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag_of(option, task)} must be a finite number, got {value}.")
        values[option.name] = _default_of(kind, option, task, built_in) if value is None else value
    return values


def method_flags(task: Task) -> frozenset[str]:
    """The flags of all methods' options on `task`."""
    return frozenset(_users_by_flag(task))


def changed_options_of(
    method: str, before: Mapping[str, Any], now: Mapping[str, Any], task: Task, built_in: bool
) -> Iterator[tuple[str, Any, Any]]:
    """The flag, the value before and the value now of each option of `method` that has changed and has an effect.

    Values that were not given are the method's defaults, so that it does not matter with which other methods a flag is shared.

    Args:
        before, now: values by flag. An option that only one side has is not compared, unless it says what came before it.
    """
    kind = method_named(method)
    fields = dataclasses.fields(kind.Options)
    unrecorded = {flag_of(each, task): each.metadata.get("before_it_existed") for each in fields}
    before = {**{flag: value for flag, value in unrecorded.items() if value is not None}, **before}
    earlier, later = (options_of(SimpleNamespace(**{**now, **side}), task, built_in, method) for side in (before, now))
    ignored = kind(kind.Options(**later)).without_effect
    for option in fields:
        if option.name not in ignored and earlier[option.name] != later[option.name]:
            yield flag_of(option, task), earlier[option.name], later[option.name]


def unused_options(options: Any, task: Task, methods: Iterable[str]) -> list[str]:
    """A sentence for each option with another value than its default that none of `methods` has or uses."""
    chosen = frozenset(methods)
    sentences = _without_effect(options, task, chosen)
    for name, option in options.method_options.items():
        value = getattr(options, name)
        if not chosen & set(option.methods) and value not in _defaults_of(name, option, task):
            users, trained = (", ".join(map(title_of, sorted(names))) for names in (option.methods, chosen))
            sentences.append(
                f"--{name} {value} is not used: it is an option of {users}, and this run trains {trained or 'no adapter'}."
                f"{renamed_flag(name, chosen, task)}"
            )
    return sentences


def _without_effect(options: Any, task: Task, methods: Iterable[str]) -> list[str]:
    """A sentence for each given option of `methods` that none of them uses with the values of the other options."""
    used, users = set(), {}
    for method in map(method_named, sorted(methods)):
        ignored = method(method.Options(**options_of(options, task, False, method.name))).without_effect
        for option in dataclasses.fields(method.Options):
            flag = flag_of(option, task)
            given = getattr(options, flag) not in (None, *(_default_of(method, option, task, each) for each in (True, False)))
            if option.name not in ignored:
                used.add(flag)
            elif given:
                users.setdefault(flag, []).append(method.title)
    return [
        f"--{flag} {getattr(options, flag)} has no effect on {', '.join(titles)} with the values of the other options."
        for flag, titles in users.items()
        if flag not in used
    ]


def renamed_flag(name: str, methods: Iterable[str], task: Task) -> str:
    """A sentence for each of `methods` whose option `name` has another flag on `task`, each after a space."""
    return "".join(
        f" The {name} of {title_of(method)} is --{flag_of(option, task)}."
        for method in sorted(methods)
        for option in dataclasses.fields(method_named(method).Options)
        if option.name == name != flag_of(option, task)
    )


def _defaults_of(flag: str, option: MethodOption, task: Task) -> list[Any]:
    """The values of a flag that was not given: None, or the default that all methods with it share, as `fill_in` sets it."""
    values = [None]
    for built_in in (True, False):
        shared = set()
        for method in map(method_named, option.methods):
            (option_field,) = (each for each in dataclasses.fields(method.Options) if flag_of(each, task) == flag)
            shared.add(_default_of(method, option_field, task, built_in))
        values += shared if len(shared) == 1 else ()
    return values


@with_method_options("subject")
@dataclass
class AdapterOptions:
    """The adapter: its method, the method's options, and the layers that it changes."""

    method: str = field(
        default=DEFAULT, metadata={"help": f"Adapter method: {', '.join(method_names())}; or {AUTO}, which is {DEFAULT}."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name endings of the UNet's layers to adapt. Default: the attention layers; on the built-in model all linear "
            "layers, and convolutions if the method supports them."
        },
    )
    train_text_encoder: bool = field(default=False, metadata={"help": "Also adapt the attention layers of both text encoders."})

    _argument_group_name = "adapter"

    def __post_init__(self) -> None:
        if self.method == AUTO:
            self.method = DEFAULT
        # Raises an error for an unknown method.
        method_named(self.method)
        fill_in(self, "subject", False, [self.method])
        if self.target_modules == []:
            raise InputError("target_modules must name at least one layer, got none.")
        # The method's options check themselves.
        self.create()

    def create(self) -> AdapterMethod:
        """The method with its options."""
        method = method_named(self.method)
        return method(method.Options(**options_of(self, "subject", False, self.method)))

    def check_quantization(self, quantize: str | None) -> None:
        """Check that the method can adapt a base model that is quantised so, or is not if `quantize` is None.

        Raises: InputError naming the method.
        """
        method = self.create()
        if quantize is not None and not method.adapts_quantized_layers:
            raise InputError(f"{method.title} does not support quantized layers. Leave out --quantize, or use another method.")
        if quantize is None and method.needs_quantization:
            raise InputError(
                f"{method.title} would start from what quantisation removes from the weights, but the base model is not "
                "quantised. Add --quantize nf4, or use another method or start."
            )
