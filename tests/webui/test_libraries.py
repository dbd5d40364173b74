"""The page loads without model libraries; the first handlers import all of them at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
AT_ONCE = """
import sys, threading
from webui import work
failed = []
def load(name):
    try:
        getattr(work, name)
    except Exception as error:
        failed.append(f"{name}: {error!r}")
threads = [threading.Thread(target=load, args=(name,)) for name in work.MODULES]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit("; ".join(failed) or 0)
"""


@pytest.mark.slow(11)
def test_modules_are_complete_when_several_threads_import_them_at_once():
    told = subprocess.run([sys.executable, "-c", AT_ONCE], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr


def names_of_modules_asked_within(tree):
    """The modules that `from ... import` imports at run time, not only for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from names_of_modules_asked_within(node)


def test_handlers_import_modules_of_work_and_no_names_from_them():
    """A name from a module is imported under an import lock, where waiting for the libraries would deadlock."""
    asking = [path for path in (REPOSITORY / "webui").rglob("*.py") if path.parent.name != "work"]
    found = {name for path in asking for name in names_of_modules_asked_within(ast.parse(path.read_text()))}
    assert "webui.work" in found
    assert not [name for name in found if name.startswith("webui.work.")]


def test_importing_the_package_loads_no_library():
    heavy = "import sys, webui.work; sys.exit(', '.join({'torch', 'diffusers', 'peft'} & set(sys.modules)) or 0)"
    told = subprocess.run([sys.executable, "-c", heavy], cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
