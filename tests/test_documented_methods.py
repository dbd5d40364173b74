"""The tables of docs/methods.md are those that benchmarks/methods.py writes."""

import importlib.util
from pathlib import Path

import pytest
from tiny_options import full_precision_methods

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "methods.md"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("methods_benchmark", ROOT / "benchmarks" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_describes_every_method_as_its_file_does(benchmark):
    assert benchmark.described() in DOCUMENT.read_text(encoding="utf-8")


def test_every_method_has_been_measured():
    table = DOCUMENT.read_text(encoding="utf-8").partition("<!-- begin: measured")[2].partition("<!-- end")[0]
    # The block that they are measured on is not quantised.
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == full_precision_methods()


def test_writing_replaces_only_what_is_between_the_comments(benchmark, tmp_path):
    document = tmp_path / "methods.md"
    document.write_text(
        "before\n<!-- begin: measured, by benchmarks/methods.py -->\nold\n<!-- end: measured -->\nafter\n", encoding="utf-8"
    )
    benchmark.write(document, {"measured": "new\n"})
    assert document.read_text(encoding="utf-8").split("\n") == [
        "before",
        "<!-- begin: measured, by benchmarks/methods.py -->",
        "new",
        "<!-- end: measured -->",
        "after",
        "",
    ]
    with pytest.raises(ValueError, match="must contain '<!-- begin: described"):
        benchmark.write(document, {"described": ""})
