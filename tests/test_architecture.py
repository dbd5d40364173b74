"""Who may import whom: app -> webui -> training -> pipelines -> nora_vision, never back."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("nora_vision", "pipelines", "training", "webui", "app")
# huggingface_hub, which PEFT requires, has the folder of cached files.
LIBRARY_MAY_IMPORT = {"torch", "peft", "safetensors", "huggingface_hub"}
PACKAGES = ("nora_vision", "pipelines", "training", "webui", "benchmarks")


def for_types_alone(tree):
    """The ids of all nodes that only a type checker reads."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imported_packages(file, at_run_time_only=False):
    """Top-level names of all that `file` imports, by absolute imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = for_types_alone(tree) if at_run_time_only else set()
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def files_of(layer):
    return sorted((ROOT / layer).rglob("*.py")) or [file for file in [ROOT / f"{layer}.py"] if file.exists()]


@pytest.mark.parametrize(("place", "layer"), list(enumerate(LAYERS)))
def test_no_package_imports_one_above_it(place, layer):
    above = set(LAYERS[place + 1 :]) | {"benchmarks", "tests"}
    offending = {str(file.relative_to(ROOT)): found for file in files_of(layer) if (found := imported_packages(file) & above)}
    assert not offending


def test_the_adapter_library_needs_torch_peft_and_safetensors_alone():
    known = LIBRARY_MAY_IMPORT | {"nora_vision", "transformers"} | set(sys.stdlib_module_names)
    strange = {str(file): found for file in files_of("nora_vision") if (found := imported_packages(file, True) - known)}
    assert not strange


def test_every_layer_that_exists_is_checked():
    assert files_of("nora_vision")
    assert files_of("pipelines")
    assert files_of("training")


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file, modules):
    """Those of `modules` that `file` imports while it runs, also within functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped, found = for_types_alone(tree), set()
    package = module_of(file) if file.name == "__init__.py" else module_of(file.parent)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            # What is imported from a package is a module of it or, failing that, a name in the package itself.
            found |= {full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names}
    return (found & modules) - {module_of(file)}


def cycle_in(graph):
    """One cycle of `graph`, its first node again at its end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def imports():
    files = {module_of(file): file for package in PACKAGES for file in files_of(package)}
    return {module: imported_modules(file, files.keys()) for module, file in files.items()}


def test_no_files_import_each_other(imports):
    assert not cycle_in(imports)


def test_no_folders_import_each_other(imports):
    """A folder and one within it count as one: what a folder's own files share lies beside the folders that use it."""

    def folder_of(module):
        return module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]

    folders = {folder_of(module): set() for module in imports}
    for module, targets in imports.items():
        folder = folder_of(module)
        for other in map(folder_of, targets):
            if not f"{other}.".startswith(f"{folder}.") and not f"{folder}.".startswith(f"{other}."):
                folders[folder].add(other)
    assert not cycle_in(folders)
