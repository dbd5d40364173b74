"""What the site needs besides its pages: files that pages link to, and tables made from the code: flags, fields and imports.

A page links to a file outside of docs/ as it would on a code host, `../LICENSE` or `../../assets/before-after.png`. Images and
notebooks are copied into the site, and the Markdown files of `PAGES` become pages of it, so that no link needs to know where the
repository is.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
logger = logging.getLogger("mkdocs.plugins.hooks")

# Files of the repository that become pages, by where they are in the site.
PAGES = {
    "LICENSE": "license.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "assets/mini-sdxl/README.md": "models/mini-sdxl.md",
    "assets/mini-clip/README.md": "models/mini-clip.md",
}
# Files that pages link to.
COPIED = ("assets/*.png", "assets/screens/*.png", "examples/*.ipynb")
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FLAGS = re.compile(r"<!-- flags: (\w+) -->")
FIELDS = re.compile(r"<!-- fields: ([\w.]+):(\w+) -->")
IMPORTS = re.compile(r"<!-- imports: (\w+) -->")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add images and notebooks, and the files that become pages."""
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for source, target in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, target, content=_page_of(source)))
    return files


def _page_of(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source == "LICENSE":
        return f"# Licence\n\n```text\n{text}```\n"
    return _relinked(FRONT_MATTER.sub("", text), source, PAGES[source], lambda link: logger.warning(link))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their copies in the site, and fill in the tables."""
    if page.file.src_uri not in PAGES.values():
        markdown = _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, logger.warning)
    markdown = FIELDS.sub(lambda match: field_table(match[1], match[2]), markdown)
    markdown = IMPORTS.sub(lambda match: import_table(match[1]), markdown)
    return FLAGS.sub(lambda match: flag_tables(match[1]), markdown)


def _relinked(markdown: str, source: str, page: str, warn: Callable[[str], None]) -> str:
    """`markdown` of the repository's file `source` as that of the site's page `page`."""

    def relink(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if "://" in link or link.startswith(("#", "mailto:")):
            return match[0]
        target = normpath(f"{Path(source).parent.as_posix()}/{link}")
        if not (ROOT / target).exists():
            warn(f"{source} links to {link!r}, which does not exist.")
        in_site = PAGES.get(target, target.removeprefix("docs/"))
        return relpath(in_site, Path(page).parent.as_posix()) + anchor

    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(relink, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(relink, markdown[end:])])


def on_pre_build(config: MkDocsConfig) -> None:
    """Check that the links of README.md lead to files that exist."""
    _relinked((ROOT / "README.md").read_text(encoding="utf-8"), "README.md", "README.md", logger.warning)


def flag_tables(command: str) -> str:
    """A table for each group of the flags of `command`, made from its parser."""
    parser = PARSERS[command]()
    lines: list[str] = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        if not actions:
            continue
        title = "" if group.title in ("options", "positional arguments") else f"**{group.title}**\n\n"
        lines += [title, "| flag | default | meaning |", "|---|---|---|", *map(_row, actions), ""]
    return "\n".join(lines)


def field_table(module: str, name: str) -> str:
    """A table of the fields of a dataclass that have a help."""
    kind = getattr(import_module(module), name)
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        # Not those that the class inherits.
        if field.name in kind.__annotations__ and "help" in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            lines.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help']} |")
    return "\n".join(lines)


def import_table(package: str) -> str:
    """A table of the modules of a package: what each is for, and which of the others it imports."""
    lines = ["| module | what it is | imports |", "|---|---|---|"]
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = {_module(node.module, alias.name) for node in nodes for alias in node.names if node.module is not None}
        others = ", ".join(f"`{name.removeprefix(f'{package}.')}`" for name in sorted(named) if name.startswith(f"{package}."))
        if summary := (ast.get_docstring(tree) or "").partition("\n")[0]:
            lines.append(f"| `{path.relative_to(ROOT / package).with_suffix('')}` | {summary} | {others} |")
    return "\n".join(lines)


def _module(base: str, name: str) -> str:
    """The module that `from base import name` imports: a module of the package `base`, else `base` itself."""
    return f"{base}.{name}" if (ROOT / base.replace(".", "/") / f"{name}.py").exists() else base


def _row(action: argparse.Action) -> str:
    # The first is the flag; HfArgumentParser adds a spelling with hyphens, and renamed flags keep their old names.
    name = action.option_strings[0] if action.option_strings else action.dest
    choices = "" if action.choices is None else f" One of {', '.join(f'`{choice}`' for choice in action.choices)}."
    text = ((action.help or "").replace("%%", "%") + choices).replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | {_default(action)} | {text} |"


def _default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value is argparse.SUPPRESS or value == []:
        return ""
    words = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return " ".join(f"`{word}`" for word in words).replace(str(ROOT), ".") if any(words) else ""


def _recipe(kind: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    from training.options import SubjectOptions
    from training.options.arena import ArenaOptions
    from training.options.command_line import groups_of
    from training.options.fewshot import FewShotOptions

    options = {"subject": SubjectOptions, "few-shot": FewShotOptions, "arena": ArenaOptions}[kind]
    return HfArgumentParser(tuple(groups_of(options).values()))


def _dataclass(module: str, name: str) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    return HfArgumentParser(getattr(import_module(module), name))


def _app() -> argparse.ArgumentParser:
    from webui.server import parser

    return parser()


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "train": lambda: _recipe("subject"),
    "fewshot": lambda: _recipe("few-shot"),
    "arena": lambda: _recipe("arena"),
    "generate": lambda: _dataclass("pipelines.subject.generate", "GenerationOptions"),
    "classify": lambda: _dataclass("pipelines.fewshot.classify", "ClassifyOptions"),
    "check_images": lambda: _dataclass("pipelines.subject.image_checks", "ImageCheckOptions"),
    "app": _app,
    "pretrain": lambda: _dataclass("training.options.pretraining", "PretrainOptions"),
}
