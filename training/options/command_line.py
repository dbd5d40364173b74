"""Options from the command line: each group of a recipe's options is a dataclass whose fields are flags."""

from __future__ import annotations

import dataclasses
import sys
import typing
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn, TypeVar

from pipelines.deprecated_flags import current_arguments
from pipelines.errors import InputError
from pipelines.help_format import USAGE, HelpFormatter
from pipelines.lazy_modules import transformers
from training.options.file import as_flags

Options = TypeVar("Options")


def groups_of(kind: type) -> dict[str, type]:
    """The groups of the options `kind`, a dataclass of dataclasses, by name."""
    return {name: group for name, group in typing.get_type_hints(kind).items() if dataclasses.is_dataclass(group)}


def parse_groups(kind: type[Options], arguments: Sequence[str] | None = None, description: str | None = None) -> Options:
    """Parse the command line; an invalid option ends the program with a message and exit code 2."""
    parser = _parser_of(kind, description)
    try:
        return _parsed(kind, parser, sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser.error(str(error))


def options_from_flags(kind: type[Options], flags: Sequence[str]) -> Options:
    """The options that `flags` set.

    Raises: InputError for an invalid option.
    """
    return _parsed(kind, _raising_parser_of(kind), flags)


@cache
def _raising_parser_of(kind: type) -> transformers.HfArgumentParser:
    def refuse(message: str) -> NoReturn:
        raise InputError(message)

    parser = _parser_of(kind, None)
    parser.error = refuse
    return parser


def _parser_of(kind: type, description: str | None) -> transformers.HfArgumentParser:
    groups = groups_of(kind)
    text = {"description": description, "usage": USAGE, "formatter_class": HelpFormatter}
    parser = transformers.HfArgumentParser(tuple(groups.values()), allow_abbrev=False, **text)
    parser.add_argument(
        "--options_file",
        help="A .json or .yaml file of options, such as the options.json of a run to be repeated. Flags on the command line take "
        "precedence.",
    )
    return parser


def _parsed(kind: type[Options], parser: transformers.HfArgumentParser, arguments: Sequence[str]) -> Options:
    """Raises: ValueError for an invalid option."""
    given, groups = current_arguments(arguments, parser), groups_of(kind)
    flags = [*_flags_of_file(given, parser, list(groups)), *given]
    parsed = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    return kind(*parsed[: len(groups)])


def _flags_of_file(given: list[str], parser: transformers.HfArgumentParser, names: list[str]) -> list[str]:
    """The options in the file given as --options_file, as flags; empty without one."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--options_file", type=Path)
    path = finder.parse_known_args(given)[0].options_file
    return [] if path is None else as_flags(path, parser, names)
