"""The options of all adapter methods as the flags of one command: made from the methods' own options, named by none here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pipelines.adapter_method import AdapterMethod
from pipelines.errors import InputError
from pipelines.methods import DEFAULT, method_named, method_names, title_of
from pipelines.run_options import Task

Group = TypeVar("Group", bound=type)


def flag_of(option: dataclasses.Field, task: Task) -> str:
    """What the flag of a method's option is called on `task`."""
    return option.metadata.get(task, option.name)


def with_method_options(task: Task) -> Callable[[Group], Group]:
    """A class decorator that adds the options of all methods to a dataclass of options, as `task` has them.

    An option that several methods have is one field. Where the default depends on the method or the base model it is None, to be
    filled in by `fill_in`. The class gets `method_options`, which tells whose each of these options is.
    """

    def decorate(group: Group) -> Group:
        users = _users_by_flag(task)
        namespace = {
            "__doc__": group.__doc__,
            "__module__": group.__module__,
            "__qualname__": group.__qualname__,
            "method_options": {name: MethodOption.of(of_name) for name, of_name in users.items()},
        }
        fields = [_flag(task, name, of_name) for name, of_name in users.items()]
        return dataclasses.make_dataclass(group.__name__, fields, bases=(group,), namespace=namespace)

    return decorate


Users = list[tuple[type[AdapterMethod], dataclasses.Field, Any]]


@dataclass(frozen=True)
class MethodOption:
    """Whose an option is.

    Args:
        methods: the names of the methods that have it.
        choices: the words that it may be; empty where it is no such word.
    """

    methods: tuple[str, ...]
    choices: tuple[str, ...]

    @classmethod
    def of(cls, users: Users) -> MethodOption:
        """The option of `users`."""
        choices = dict.fromkeys(choice for _, option, _ in users for choice in option.metadata.get("choices", ()))
        return cls(tuple(method.name for method, *_ in users), tuple(choices))


def _typed_fields(kind: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(kind)
    return [(option, hints[option.name]) for option in dataclasses.fields(kind)]


def _users_by_flag(task: Task) -> dict[str, Users]:
    """By flag: each method that has it, its option, and the option's type."""
    users: dict[str, Users] = {}
    for name in (DEFAULT, *(name for name in method_names() if name != DEFAULT)):
        method = method_named(name)
        for option, hint in _typed_fields(method.Options):
            users.setdefault(flag_of(option, task), []).append((method, option, hint))
    return users


def _flag(task: Task, name: str, users: Users) -> tuple[str, Any, Any]:
    """The field that stands for an option of all its users.

    Raises: TypeError if they have it with different types, which is a fault of a method's file.
    """
    hints = {hint for _, _, hint in users}
    if len(hints) > 1:
        raise TypeError(
            f"The option {name!r} has different types in the methods {', '.join(m.name for m, *_ in users)}: {hints}."
        )
    defaults = {_default(option) for _, option, _ in users}
    decided = any(option.name in _decided(method, task) for method, option, _ in users)
    metadata = {"help": _help(task, users)}
    hint = hints.pop()
    if len(defaults) > 1 or decided:
        return name, hint | None, field(default=None, metadata=metadata)
    return name, hint, field(default=defaults.pop(), metadata=metadata)


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _decided(method: type[AdapterMethod], task: Task) -> dict[str, Any]:
    return {**method.defaults(task, True).options, **method.defaults(task, False).options}


def _help(task: Task, users: Users) -> str:
    """Each different help of the users, with the titles of those that have it and what it is by default."""
    titles: dict[str, list[str]] = {}
    for method, option, _ in users:
        decided = _decided(method, task).get(option.name)
        unless = "" if decided is None else f" ({decided} unless given)"
        titles.setdefault(f"{option.metadata['help']}{unless}", []).append(title_of(method.name))
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in titles.items()) + "."


def fill_in(options: Any, task: Task, built_in: bool, methods: Iterable[str]) -> None:
    """Fill in what was not given of the options that `methods` have, from their defaults on `task`."""
    for name in methods:
        method = method_named(name)
        decided = method.defaults(task, built_in).options
        for option in dataclasses.fields(method.Options):
            flag = flag_of(option, task)
            if getattr(options, flag) is None:
                setattr(options, flag, decided.get(option.name, _default(option)))


def options_of(options: Any, task: Task, method: str) -> dict[str, Any]:
    """The values of the options that `method` has, by its own names for them."""
    return {option.name: getattr(options, flag_of(option, task)) for option in dataclasses.fields(method_named(method).Options)}


def unused_options(options: Any, task: Task, methods: Iterable[str]) -> list[str]:
    """A sentence for each option that was given, other than by default, and that none of `methods` has."""
    chosen = frozenset(methods)
    sentences = []
    for name, option in options.method_options.items():
        value = getattr(options, name)
        if not chosen & set(option.methods) and value not in _defaults_of(name, option, task):
            users, trained = (", ".join(map(title_of, sorted(names))) for names in (option.methods, chosen))
            sentences.append(
                f"--{name} {value} is not used: it is an option of {users}, and this trains {trained or 'no adapter'}."
            )
    return sentences


def _defaults_of(flag: str, option: MethodOption, task: Task) -> list[Any]:
    """What a flag may be without having been given: None, or what any of its methods has by default."""
    values = [None]
    for method in map(method_named, option.methods):
        (option_field,) = (each for each in dataclasses.fields(method.Options) if flag_of(each, task) == flag)
        values += [
            _default(option_field),
            *(method.defaults(task, built_in).options.get(option_field.name) for built_in in (True, False)),
        ]
    return values


@with_method_options("subject")
@dataclass
class AdapterOptions:
    """The adapter: its method, its size, and what it is put on."""

    method: str = field(default=DEFAULT, metadata={"help": f"Adapter method: {', '.join(method_names())}."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Name endings of the UNet's layers to adapt: its attention unless said, and on the built-in model, whose "
            "finest level has none, its convolutions too, where the method can adapt them."
        },
    )
    train_text_encoder: bool = field(default=False, metadata={"help": "Adapt the attention of both text encoders too."})

    _argument_group_name = "adapter"

    def __post_init__(self) -> None:
        # Refuses an unknown method.
        method_named(self.method)
        fill_in(self, "subject", False, [self.method])
        if self.target_modules == []:
            raise InputError("target_modules must name at least one layer, got none.")
        # The configuration checks every other option, before any model is loaded.
        self.create().config(self.target_modules or [])

    def create(self) -> AdapterMethod:
        """The method with its options."""
        method = method_named(self.method)
        return method(method.Options(**options_of(self, "subject", self.method)))
