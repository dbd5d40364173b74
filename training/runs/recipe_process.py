"""Starting a recipe as a process of its own, which joins no group of processes that this one may belong to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipelines.built_in import import_path

DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def recipe_command(recipe: str, flags: Sequence[str]) -> list[str]:
    """The command that runs the module `recipe` with `flags`."""
    return [sys.executable, "-P", "-m", recipe, *flags]


def single_process_environment() -> dict[str, str]:
    """The environment without the variables of distributed training, with this project on the import path."""
    distributed = {name for name in os.environ if name in DISTRIBUTED or name.startswith("TORCHELASTIC")}
    return {name: value for name, value in os.environ.items() if name not in distributed} | import_path()
