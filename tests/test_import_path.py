"""A script's own folder is the first entry of the import path: no name beside one may hide anything that is importable."""

import ast
import functools
import importlib.util
import pkgutil
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = "nora-vision"
NOT_OURS = {".git", ".venv", "build"}


def is_script(file):
    """Whether `file` has an `if __name__ == "__main__":` of its own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tests = (ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If))
    return any(test.startswith("__name__ == ") for test in tests)


def first_on_the_path(root):
    """The folders that come first on the import path: those with a script in them, and, under pytest, those with tests."""
    files = (file for file in root.rglob("*.py") if not NOT_OURS & set(file.relative_to(root).parts))
    return sorted({file.parent for file in files if is_script(file) or "tests" in file.relative_to(root).parts})


@functools.cache
def importable_names(ours=OURS):
    """Top-level names of all installed distributions but `ours`, of the standard library, and of modules outside of both."""
    installed = {name for name, owners in packages_distributions().items() if set(owners) - {ours}}
    folders = [path for path in sys.path if path and not Path(path).resolve().is_relative_to(ROOT)]
    return installed | set(sys.stdlib_module_names) | {module.name for module in pkgutil.iter_modules(folders)}


def names_beside(folder):
    """What Python would import from `folder`: modules and folders, with an `__init__.py` or without."""
    files = {path.stem for path in folder.iterdir() if path.suffix in (".py", ".so", ".pyc")}
    folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name.isidentifier()}
    return files | folders


@pytest.mark.parametrize("folder", first_on_the_path(ROOT), ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_no_name_that_comes_first_on_the_path_hides_an_importable_one(folder):
    hidden = {name for name in names_beside(folder) & importable_names() if not _is_a_bare_folder(folder / name)}
    assert not hidden, f"{folder} hides {sorted(hidden)} from everything that starts there"


def _is_a_bare_folder(path):
    """A folder without Python in it, such as assets: an installed module of its name wins over it."""
    return path.is_dir() and not (path / "__init__.py").exists()


def test_recipes_share_their_folder_with_packages_alone():
    modules = {path.name for path in (ROOT / "training").glob("*.py")}
    assert modules == {"__init__.py", "arena.py", "dreambooth_nora.py", "fewshot_nora.py", "pretrain_mini.py"}


def test_the_comparison_sees_a_module_that_hides_a_library(tmp_path):
    (tmp_path / "requests.py").touch()
    (tmp_path / "recipe.py").write_text('if __name__ == "__main__":\n    pass\n')
    assert first_on_the_path(tmp_path) == [tmp_path]
    assert names_beside(tmp_path) & importable_names() == {"requests"}
    assert importlib.util.find_spec("requests") is not None
