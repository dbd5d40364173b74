"""Modules run as `python -m` runs them, in this process."""

import runpy
import sys

import pytest


def exit_status(module, *arguments):
    """The exit status of `python -m module arguments`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)
        try:
            # Annotations are looked up in `sys.modules["__main__"]`.
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return ended.code
    return 0
