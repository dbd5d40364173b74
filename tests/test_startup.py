"""`--help` and wrong flags are answered before libraries are imported that take seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "training.dreambooth_nora",
    "training.fewshot_nora",
    "training.pretrain_mini",
    "pipelines.subject.generate",
    "pipelines.fewshot.classify",
    "pipelines.subject.image_checks",
)
# PEFT, diffusers, transformers' models and open_clip import torch.compile's parts, and bitsandbytes where it is installed.
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
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.trainer",
)
SCRIPT = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("imported:", *sys.modules)
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_no_model_library(module):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    text, _, imported = done.stdout.rpartition("imported: ")
    assert "usage:" in text
    assert not set(SLOW) & set(imported.split())
