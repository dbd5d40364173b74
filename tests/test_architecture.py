"""Who may import whom: app -> webui -> training -> pipelines -> nora_vision, never back."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("nora_vision", "pipelines", "training", "webui", "app")
LIBRARY_MAY_IMPORT = {"torch", "peft", "safetensors"}


def imported_packages(file, at_run_time_only=False):
    """Top-level names of all that `file` imports, by absolute imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = set()
    if at_run_time_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
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
