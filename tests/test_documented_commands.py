"""Every command and every Python block of README.md and docs/ runs, and what their sentences name exists."""

import argparse
import re
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from accelerate.commands.launch import launch_command_parser
from documented import INLINE, ROOT, code_blocks, inline_commands, line_of, pages, without_fences
from documented_runs import LLAMA, NOT_RUN, RUN_BY_CI, RUNS, UnknownCommandError, Workspace, make_runs, run_python

from pipelines.built_in import BUILT_IN_MODEL

README_LINES = 180
SHELL, PYTHON = code_blocks("bash", "sh", "shell", "console"), code_blocks("python")
IN_BLOCKS = [command for block in SHELL for command in block.commands()]
# Those that a documented command starts with only name its program.
INLINE_COMMANDS = [
    block
    for block in inline_commands()
    if not any(one.words[: len(named.words)] == named.words for named in block.commands() for one in IN_BLOCKS)
]
# What other programs call their flags is in the first columns of these pages' tables.
OTHER_PROGRAMS = ("docs/migrating.md",)
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")
NAMED_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")


@pytest.fixture(scope="session")
def documented_runs(tiny_model, images_dir, tmp_path_factory):
    """The folder of two finished runs on the built-in models, RUN and CLASSIFIER."""
    with pytest.MonkeyPatch.context() as patch:
        return make_runs(Workspace(tmp_path_factory.mktemp("documented") / "checkout", tiny_model, images_dir, patch))


@pytest.fixture
def checkout(block, request, hub_server, tiny_model, images_dir, tmp_path, monkeypatch):
    """A folder in which all that `block` names is there, and which this process works in."""
    checkout = Workspace(tmp_path / "checkout", tiny_model, images_dir, monkeypatch)
    if any(name in block.text for name in RUNS):
        checkout.add_runs(request.getfixturevalue("documented_runs"))
    # Python blocks load RUN into it, which is of the built-in model.
    if LLAMA in block.text:
        checkout.add_language_model(hub_server)
    checkout.serve_models(hub_server, BUILT_IN_MODEL if block.language == "python" else tiny_model)
    return checkout


def block_id(block):
    return block.where


@pytest.mark.parametrize("block", [*SHELL, *INLINE_COMMANDS], ids=block_id)
def test_a_documented_command_runs(block, checkout):
    for command in block.commands():
        if str(command) in NOT_RUN:
            continue
        try:
            checkout.run(command)
        except UnknownCommandError as unknown:
            pytest.fail(
                f"{block.where} has `{unknown}`, which tests/documented_runs.py cannot run. Add a rule to RULES there, or the "
                "command and the reason why no test runs it to NOT_RUN."
            )


@pytest.mark.parametrize("block", PYTHON, ids=block_id)
def test_a_documented_python_block_runs(block, checkout):
    run_python(checkout, block.text, block.where)


def test_what_is_not_run_is_documented_and_run_by_ci_where_it_is_said_to_be():
    documented = {str(command) for block in [*SHELL, *inline_commands()] for command in block.commands()}
    assert sorted(set(NOT_RUN) - documented) == [], "remove these from NOT_RUN"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [command for command, reason in NOT_RUN.items() if reason == RUN_BY_CI and command not in ci] == []


def known_flags():
    """The flags that are not deprecated, of every parser that docs/command-line.md lists, and those of accelerate's launcher."""
    spec = spec_from_file_location("documentation_hooks", ROOT / "docs" / "hooks.py")
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    parsers = [*(make() for make in hooks.PARSERS.values()), launch_command_parser()]
    actions = [action for parser in parsers for action in parser._actions if action.help != argparse.SUPPRESS]
    return {flag for action in actions for flag in action.option_strings}


def test_every_flag_that_is_named_exists():
    known = known_flags() | {word for command in IN_BLOCKS for word in command.words} | {"--options_file"}
    unknown = []
    for page, text in pages().items():
        lines = without_fences(text).splitlines()
        for number, line in enumerate(lines, 1):
            if page in OTHER_PROGRAMS and line.startswith("|"):
                line = line.strip().strip("|").rpartition("|")[2]
            unknown += [f"{page}:{number} {flag}" for flag in FLAG.findall(line) if flag not in known]
    assert unknown == []


def test_every_path_that_is_named_exists():
    top = {path.name for path in ROOT.iterdir()} - {"runs", "uploads"}
    missing = []
    for page, text in pages().items():
        prose = without_fences(text)
        for match in INLINE.finditer(prose):
            name = match[1]
            # NAME stands for any name.
            pattern = name.rstrip("/").replace("NAME", "*")
            if NAMED_PATH.fullmatch(name) and "/" in name and name.split("/")[0] in top and not any(ROOT.glob(pattern)):
                missing.append(f"{page}:{line_of(prose, match.start())} {name}")
    assert missing == []


def test_the_readme_is_read_in_five_minutes():
    assert len(pages()["README.md"].splitlines()) <= README_LINES
