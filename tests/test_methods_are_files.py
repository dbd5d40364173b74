"""A method is one file: nothing outside of pipelines/methods names one, and a package installed beside this one adds its own."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.methods import method_named, method_names, title_of

ROOT = Path(__file__).parents[1]
# Words that are the name of a method and of something else, where they mean the other.
OTHER_MEANINGS = {
    ("training/options/fewshot.py", "lora"): "a form of export: a file of plain LoRA",
    ("training/fewshot_nora.py", "lora"): "the same, and its folder",
    ("training/fewshot/trials.py", "lora"): "the same, whose error is said before the training",
    ("webui/classifiers.py", "lora"): "the same, offered for download",
    ("pipelines/prompt_syntax.py", "lora"): "A1111's <lora:name:1> in a prompt",
    ("training/subject/model_card.py", "lora"): "the hub's tag for files of LoRA",
}
# About files of LoRA, whoever wrote them.
FORMATS = ("pipelines/subject/lora_files/",)


def texts_of(file):
    """Every string in a file but docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in nodes if id(node) not in documentation]


def files():
    found = [ROOT / "app.py", *(file for part in ("pipelines", "training", "webui") for file in (ROOT / part).rglob("*.py"))]
    names = {file.relative_to(ROOT).as_posix(): file for file in found}
    return {name: file for name, file in names.items() if not name.startswith(("pipelines/methods/", *FORMATS))}


def test_no_other_file_names_a_method():
    named = {(name, text) for name, file in files().items() for text in texts_of(file) if text in method_names()}
    assert named == set(OTHER_MEANINGS)


def test_no_other_file_imports_a_method():
    pattern = re.compile(r"pipelines\.methods\.\w|from pipelines\.methods import .*\b(" + "|".join(method_names()) + r")\b")
    assert [name for name, file in files().items() if pattern.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", method_names())
def test_a_method_says_who_it_is(name):
    method = method_named(name)
    assert method.name == name
    assert method.title == title_of(name)
    assert re.search(r"\b(19|20)\d\d\b", method.reference)


METHOD = """
from dataclasses import dataclass, field
from pipelines.methods.lora import Lora, LoraOptions

@dataclass
class Options(LoraOptions):
    warmth: float = field(default=0.5, metadata={"help": "how warm"})

class WarmLora(Lora):
    name, title, reference = "warm_lora", "Warm LoRA", "Nobody 2026"
    Options = Options
"""
# What an installer writes for [project.entry-points."nora_vision.methods"].
INSTALLED = {
    "warm_lora.py": METHOD,
    "warm_lora-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: warm-lora\nVersion: 1\n",
    "warm_lora-1.dist-info/entry_points.txt": "[nora_vision.methods]\nwarm_lora = warm_lora:WarmLora\n",
}
USE = """
from pipelines.methods import method_names, title_of
from training.options import SubjectOptions, parse_options
from training.options.fewshot import parse_fewshot_options
from webui.form_schema import form_fields
options = parse_options(["--method", "warm_lora", "--warmth", "0.75", "--rank", "3"])
method = options.adapter.create()
assert method.options.warmth == 0.75 and method.config(["q"]).r == 3
assert parse_fewshot_options(["--method", "warm_lora"]).adapter("warm_lora").create().options.warmth == 0.5
assert title_of("warm_lora") == "Warm LoRA"
assert [f.methods for f in form_fields("subject", True)["adapter"] if f.name == "warmth"] == [("warm_lora",)]
print("used")
"""


@pytest.mark.slow(8)
def test_a_package_that_is_installed_adds_its_method(tmp_path):
    (tmp_path / "warm_lora-1.dist-info").mkdir()
    for name, content in INSTALLED.items():
        (tmp_path / name).write_text(content)
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    used = subprocess.run([sys.executable, "-c", USE], env=env, capture_output=True, text=True, check=False)
    assert used.stdout.strip().endswith("used"), used.stderr
