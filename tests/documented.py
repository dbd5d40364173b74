"""README.md, CONTRIBUTING.md and the pages in docs/ as a program reads them: code blocks, the commands in these, and prose."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where PATH holds no program, Bash calls this function instead of starting one. So loops, line continuations, quotes and comments
# mean what they mean in a terminal, and nothing is run.
NO_PROGRAMS = "/no-programs"
RECORD_COMMANDS = r"""
command_not_found_handle() {
    printf '%s\0' "$#" "$@"
    for name in $(compgen -e); do printf '%s\0' "$name=${!name}"; done
    printf '\0'
}
"""
# Variables that Bash sets itself.
BASH_VARIABLES = {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
# An inline command that can be run as it stands. Others, such as `accelerate launch`, only name a program.
INLINE_COMMAND = re.compile(r"accelerate launch .*\.py.*|(python|nora-vision|pip|mkdocs|ruff|docker) .*")
ELLIPSIS = "..."


@dataclass(frozen=True)
class Command:
    """What a shell would start: its words, and the variables that are set for it alone."""

    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Block:
    """A fenced code block or an inline command of a page.

    Args:
        page: relative to the repository.
        line: of the first line of the code, from 1.
    """

    page: str = field(compare=False)
    line: int = field(compare=False)
    language: str
    text: str

    @property
    def where(self) -> str:
        """For people, and as the name of a test."""
        return f"{self.page}:{self.line}"

    @cache  # noqa: B019 - blocks live as long as the tests do
    def commands(self) -> tuple[Command, ...]:
        """The commands of a Bash block, in the order in which Bash would run them."""
        command = ["/bin/bash", "--noprofile", "--norc", "-c", RECORD_COMMANDS + self.text]
        recorded = subprocess.run(command, env={"PATH": NO_PROGRAMS}, capture_output=True, text=True, check=False)
        if recorded.returncode or recorded.stderr:
            raise ValueError(f"{self.where} is not valid Bash: {recorded.stderr}")
        words = iter(recorded.stdout.split("\0")[:-1])
        found = []
        for count in words:
            argv = tuple(next(words) for _ in range(int(count)))
            variables = [tuple(pair.split("=", 1)) for pair in iter(lambda: next(words), "")]
            found.append(Command(argv, tuple(pair for pair in variables if pair[0] not in BASH_VARIABLES)))
        return tuple(found)


@cache
def pages() -> dict[str, str]:
    """The text of README.md, CONTRIBUTING.md and every page in docs/, by its path in the repository."""
    paths = [ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md"), *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def code_blocks(*languages: str) -> list[Block]:
    """The fenced blocks in any of `languages`; one that occurs several times is returned once."""
    blocks = {}
    for page, text in pages().items():
        for match in FENCE.finditer(text):
            if match["language"] in languages:
                block = Block(page, line_of(text, match.start("text")), match["language"], match["text"])
                blocks.setdefault(block, block)
    return list(blocks.values())


def inline_commands() -> list[Block]:
    """The commands in `code` within sentences and tables, where they are complete."""
    blocks = {}
    for page, text in pages().items():
        for match in INLINE.finditer(without_fences(text)):
            if INLINE_COMMAND.fullmatch(match[1]) and ELLIPSIS not in match[1]:
                block = Block(page, line_of(text, match.start()), "bash", match[1] + "\n")
                blocks.setdefault(block, block)
    return list(blocks.values())


def without_fences(text: str) -> str:
    """`text` with every fenced block blanked; lines and positions stay."""
    return FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def line_of(text: str, position: int) -> int:
    """The line of a position in `text`, from 1."""
    return text.count("\n", 0, position) + 1
