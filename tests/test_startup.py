"""`--help` and wrong flags are answered before libraries are imported that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "training.dreambooth_nora",
    "training.fewshot_nora",
    "training.pretrain_mini",
    "training.arena",
    "pipelines.subject.generate",
    "pipelines.fewshot.classify",
    "pipelines.subject.image_checks",
)
SLOW = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "matplotlib",
    "onnx",
    "open_clip",
    "pandas",
    "peft",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.trainer",
)
# One after the other in one process, which imports torch once.
SCRIPT = """
import runpy, sys
for module in sys.argv[1:]:
    before = set(sys.modules)
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert ended.code == 0, ended.code
    print("imported:", *set(sys.modules) - before, flush=True)
"""


def test_help_imports_no_model_library():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *COMMANDS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("usage:") == len(COMMANDS)
    imported = re.findall("^imported: (.*)$", done.stdout, re.MULTILINE)
    slow = [(command, sorted(set(SLOW) & set(names.split()))) for command, names in zip(COMMANDS, imported, strict=True)]
    assert [(command, names) for command, names in slow if names] == []


def test_the_options_of_all_methods_need_no_model_library():
    script = """
import sys
from training.options import SubjectOptions
from training.options.fewshot import FewShotOptions
SubjectOptions(), FewShotOptions()
print(*sys.modules)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert {"torch", "transformers", "safetensors", *SLOW}.isdisjoint(done.stdout.split())
