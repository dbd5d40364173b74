"""The page's process imports no model library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from browsing import go_to
from gradio_client import Client
from processes import wait_for
from small_runs import small_run

REPOSITORY = Path(__file__).parents[2]
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
    words = [sys.executable, "-c", IMPORT_ALL, *(name for name in names if name != "webui.inference_jobs")]
    told = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_no_function_of_the_web_app_imports_a_module():
    functions = [
        node
        for path in (REPOSITORY / "webui").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 100
    importing = [node for node in functions if any(isinstance(each, ast.Import | ast.ImportFrom) for each in ast.walk(node))]
    assert [node.name for node in importing] == []


@pytest.mark.slow(40)
def test_the_page_of_a_server_is_used_without_loading_a_model_library_and_its_worker_ends_with_it(
    app_server, new_page, tiny_model
):
    server = app_server(forked=False)
    run = small_run(server.runs, tiny_model, "20260101-000001-drawer").path.name
    page = new_page(server.url)
    page.wait_for_selector(".photo-card .chip.good", timeout=90_000)
    go_to(page, "check")
    page.wait_for_selector("#check-crops img", timeout=90_000)
    generated = Client(server.url, verbose=False).predict(run, "a star", steps=2, api_name="/generate")
    assert Path(generated).is_file()
    (worker,) = psutil.Process(server.process.pid).children()
    loaded = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, worker.pid)}
    assert "libtorch" in loaded[worker.pid]
    assert not re.search(r"site-packages/(torch|sklearn|scipy|safetensors|tokenizers)/.*", loaded[server.process.pid])
    server.kill()
    assert wait_for(lambda: not worker.is_running())
