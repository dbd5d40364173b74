"""Processes of tests and benchmarks: the app, and runs that are started like the page does, with a stand-in for training."""

import asyncio
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
ADDRESS = re.compile(r"NoRA Vision is at (http://\S+)")
PATIENCE, START_PATIENCE = 90, 240
# Like a trainer: reports that it trains, ends on request, and records signals.
RECIPE = """
import os, pathlib, signal, sys, time
from training.runs.record import RunRecord, update_status
run = RunRecord(pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]))
(run.path / "began").write_text(" ".join(sys.argv[1:]))
time.sleep(float(os.environ.get("LOADS", "0")))
if os.environ.get("FAILS"):
    print("dreambooth_nora.py: error: rank must be at least 1, got 0.", file=sys.stderr, flush=True)
    sys.exit(2)
def stopped(number, frame):
    update_status(run, state="stopped", error="Stopped: stopped by SIGTERM")
    sys.exit(143)
signal.signal(signal.SIGTERM, stopped)
update_status(run, state="running", phase="training", step=1, total=4)
while not (run.path / "end").exists():
    time.sleep(0.02)
update_status(run, state="done", phase="done", step=4)
"""
# Like accelerate: a process that waits for the process of the recipe.
LAUNCHER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {RECIPE!r}, *sys.argv[1:]])
if child.wait() != 0:
    raise subprocess.CalledProcessError(child.returncode, child.args)
"""


def app_command(home, *options, script="app.py"):
    """The command, without the interpreter, of an app whose runs and uploads are in `home`."""
    return [script, "--runs_dir", str(home / "runs"), "--uploads_dir", str(home / "uploads"), *options]


def start_process(command, log, environment=None):
    """Start Python with the words of `command` in the repository's folder; its output goes to the file `log`."""
    with log.open("w") as output:
        words = [sys.executable, *command]
        return subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


def address_of(process, log):
    """The address of an app, once it has written it to the file `log`. Raises: RuntimeError with the log if it does not."""
    end = time.monotonic() + START_PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if found := ADDRESS.search(log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"The server did not start:\n{log.read_text()}")


def standing_for_accelerate(words):
    """The arguments of a command with `LAUNCHER` in place of accelerate."""
    return [sys.executable, "-c", LAUNCHER, *words[1:]]


def wait_for(what):
    """Wait until `what()` is true; returns it."""
    began = time.monotonic()
    while not (found := what()):
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)
    return found


def kill_all(process):
    """Kill a process and its children, some of which may have ended by themselves."""
    with suppress(psutil.NoSuchProcess):
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()


def kill_all_naming(folder):
    """Kill every process whose command contains `folder`, and its children."""
    while matches := [one for one in psutil.process_iter(["cmdline"]) if names(one, folder)]:
        for process in matches:
            kill_all(process)


def names(process, folder):
    """Whether the process is alive and its command contains `folder`."""
    return any(str(folder) in word for word in process.info["cmdline"] or [])


def apart(coroutine):
    """The result of a coroutine, run in a separate thread because a browser's event loop may run in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
