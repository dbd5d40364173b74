"""The page needs no library; the screens' first handlers need all of them, at once."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
AT_ONCE = """
import importlib, sys, threading
names, failed = sys.argv[1:], []
def load(name):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {error!r}")
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit("; ".join(failed) or 0)
"""


def test_modules_that_several_threads_ask_for_at_once_are_whole():
    names = [f"webui.work.{path.stem}" for path in sorted((REPOSITORY / "webui" / "work").glob("[!_]*.py"))]
    told = subprocess.run([sys.executable, "-c", AT_ONCE, *names], cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_the_package_itself_loads_none_of_them():
    heavy = "import sys, webui.work; sys.exit(', '.join({'torch', 'diffusers', 'peft'} & set(sys.modules)) or 0)"
    told = subprocess.run([sys.executable, "-c", heavy], cwd=REPOSITORY, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
