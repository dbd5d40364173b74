"""The page's process imports no model library."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# The options and the form of the page are not free of torch yet.
LOADED_BY = {"webui.inference_jobs", "webui.work.options", "webui.work.form_schema"}
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"torch", "torchvision", "diffusers", "transformers", "peft", "sklearn", "scipy", "open_clip"}
heavy |= {"accelerate", "safetensors"}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""


def test_no_module_of_the_page_imports_a_model_library():
    paths = sorted(path.relative_to(REPOSITORY).with_suffix("") for path in (REPOSITORY / "webui").rglob("*.py"))
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    assert "webui.page" in names
    words = [sys.executable, "-c", IMPORT_ALL, *(name for name in names if name not in LOADED_BY)]
    told = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
