"""The console command `nora-vision`: each subcommand runs the module that `python -m` would run, in this process.

    nora-vision train --max_train_steps 100
    accelerate launch -m training.dreambooth_nora --max_train_steps 100

do the same; the second form can start one process per device. This file imports the standard library only, so that
`nora-vision --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

PROGRAM = "nora-vision"


class Subcommand(NamedTuple):
    """The module that a subcommand runs as `__main__`, and one line for the help."""

    module: str
    summary: str


SUBCOMMANDS = {
    "train": Subcommand("training.dreambooth_nora", "train an adapter of SDXL on images of one subject"),
    "fewshot": Subcommand("training.fewshot_nora", "train classifiers on a few images per class and compare them"),
    "arena": Subcommand("training.arena", "compare adapter methods on subjects and labelled datasets"),
    "generate": Subcommand("pipelines.subject.generate", "generate images with trained adapters"),
    "classify": Subcommand("pipelines.fewshot.classify", "classify images with a trained classifier"),
    "check-images": Subcommand("pipelines.subject.image_checks", "check a folder of training images"),
    "app": Subcommand("webui.server", "open the web app"),
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the subcommand named by the first of `arguments` with the other ones; returns 2 if it does not exist."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name not in SUBCOMMANDS:
        sys.stderr.write(f"{PROGRAM}: there is no subcommand {name!r}. Choose one of {', '.join(SUBCOMMANDS)}.\n")
        return 2
    run_as_main(SUBCOMMANDS[name].module, [f"{PROGRAM} {name}", *rest])
    return None


def usage() -> str:
    """The text of `nora-vision --help`."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {subcommand.summary}" for name, subcommand in SUBCOMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} SUBCOMMAND [options]",
            "",
            *lines,
            "",
            f"'{PROGRAM} SUBCOMMAND --help' lists the options of a subcommand.",
            f"'accelerate launch -m {SUBCOMMANDS['train'].module}' trains on several devices; it takes the options of train.",
            "",
        )
    )


def run_as_main(module: str, words: list[str]) -> None:
    """Run `module` as `__main__` with `words` as `sys.argv`.

    `runpy.run_module` would replace the first word by the module's path, and usage messages take the program's name from it.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"The module {module!r} is missing. Install {PROGRAM} again.", name=module)
    namespace = ModuleType("__main__", __doc__)
    namespace.__file__ = spec.origin
    sys.argv, sys.modules["__main__"] = words, namespace
    exec(spec.loader.get_code(module), vars(namespace))  # type: ignore[union-attr]
