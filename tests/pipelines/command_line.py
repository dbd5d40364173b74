"""Modules run as `python -m` runs them, in this process."""

import runpy
import sys

import pytest


def exit_status(module, *arguments):
    """What `python -m module arguments` ends with, where it ends with a status of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as ended:
            # Annotations are looked up in `sys.modules["__main__"]`.
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    return ended.value.code
