"""Renamed options: old flags and old names in saved files are read under the current names."""

import json
import re
from argparse import ArgumentParser

import pytest
from documented import ROOT

from pipelines.deprecated_flags import RENAMED_GROUPS, RENAMED_OPTIONS, RENAMED_VALUES, current_arguments, with_current_names
from pipelines.run_options import run_options

SWITCHES = {"memory_fallback"}


def parser_of(*names):
    parser = ArgumentParser()
    for name in names:
        parser.add_argument(f"--{name}")
        if name in SWITCHES:
            parser.add_argument(f"--no_{name}", action="store_true")
    return parser


ALIASES = [(f"--{old}", f"--{new}") for old, new in RENAMED_OPTIONS.items()]
ALIASES += [(f"--no_{old}", f"--no_{new}") for old, new in RENAMED_OPTIONS.items() if new in SWITCHES]


@pytest.mark.parametrize(("old", "new"), ALIASES)
def test_a_deprecated_flag_is_read_as_the_new_one_and_logs_one_line(old, new, caplog):
    parser = parser_of(*RENAMED_OPTIONS.values())
    assert current_arguments([old, "3", f"{old}=4"], parser) == [new, "3", f"{new}=4"]
    assert [record.getMessage() for record in caplog.records] == [f"{old} is deprecated; use {new}."]


def test_the_changelog_lists_the_deprecated_flags():
    deprecated = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("### Deprecated")[2].partition("\n### ")[0]
    listed = []
    for row in re.findall(r"^\| (`.*) \| (`.*) \|$", deprecated, re.MULTILINE):
        listed += zip(*(re.findall(r"`(--[^`]*)`", cell) for cell in row), strict=True)
    values = [(f"--{name} {old}", f"--{name} {new}") for name, pairs in RENAMED_VALUES.items() for old, new in pairs.items()]
    assert sorted(listed) == sorted(ALIASES + values)


def test_current_flags_and_unknown_flags_are_unchanged(caplog):
    arguments = ["--scale", "picture", "--photos_dir", "strength", "ladder"]
    assert current_arguments(arguments, parser_of("scale")) == arguments
    assert not caplog.records


@pytest.mark.parametrize("given", [["--size_conditioning", "picture"], ["--size_conditioning=picture"]])
def test_a_renamed_value_is_replaced(given):
    expected = [argument.replace("picture", "image") for argument in given]
    assert current_arguments(given, parser_of("size_conditioning")) == expected


def test_names_of_saved_options_are_replaced_in_groups_and_at_the_top_level():
    old = {"size_conditioning": "picture", **dict.fromkeys(RENAMED_OPTIONS, 2)}
    new = {"size_conditioning": "image", **dict.fromkeys(RENAMED_OPTIONS.values(), 2)}
    assert with_current_names(old) == new == with_current_names(new)
    assert with_current_names(dict.fromkeys(RENAMED_GROUPS, old)) == dict.fromkeys(RENAMED_GROUPS.values(), new)


def test_the_options_of_an_old_run_are_read(tmp_path):
    (tmp_path / "options.json").write_text(json.dumps({"judging": {"judge_model": "base"}, "data": {"crops_per_picture": 3}}))
    assert run_options(tmp_path) == {"validation": {"image_scorer": "base"}, "data": {"crops_per_image": 3}}
