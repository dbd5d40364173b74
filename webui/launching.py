"""Start, resume, stop, duplicate and delete runs, and send requests to them.

A run is the command that the page shows, in a separate process that waits in a queue (`training.runs.waiting`). The server only
starts it and reads the run's directory, so either can end without the other.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pipelines.built_in import IS_CHECKOUT, ROOT, import_path
from pipelines.errors import InputError
from pipelines.run_file import ResolvedOptions
from training.options.values import Values, changed, flags
from training.runs import run_requests
from training.runs.record import RunRecord
from training.runs.run_files import Launch
from training.runs.run_log import LOG, START
from training.runs.waiting import CLEARED, QUEUE
from webui.datasets import Dataset
from webui.form_schema import validated
from webui.inference_worker import WORKER
from webui.runs import RunView
from webui.workspace import Workspace

RECIPES = {"subject": "training/dreambooth_nora.py", "classify": "training/fewshot_nora.py"}
LAUNCHER, ARENA = ("accelerate", "launch"), ("python", "-m", "training.arena")
RESUMING = ["--resume_from_checkpoint", "latest"]
LAUNCHING, DELETED = ".launching", ".deleted-"
REFUSALS: dict[str, str] = {
    "resume": "Only an interrupted, stopped or failed run can be resumed.",
    "stop": "The run is not active.",
    "sample": "Sample images can be requested while a run trains.",
    "save": "A checkpoint can be requested while a run trains.",
    "delete": "An active run cannot be deleted. Stop it first.",
}


def start(workspace: Workspace, task: str, options: Values) -> str:
    """Start a run; returns its id. Uploaded photos that it is to train on cannot be changed from now on.

    Args:
        task: "subject" or "classify".
        options: the values that differ from the defaults, by group and field, as in SubjectOptions or FewShotOptions.
    Raises: InputError for an invalid option, before anything is written.
    """
    values, _ = validated(workspace, task, options)
    flags(task, values)
    photos = values.get("data", {}).get("instance_data_dir")
    if photos is not None and workspace.is_image_set(photos):
        Dataset(Path(photos)).seal()
    path = workspace.new_run().absolute()
    words = command(task, values, path)
    Launch(task, words, time.time(), values).write(path)
    _spawn(workspace, path, words)
    return path.name


def start_arena(workspace: Workspace, path: Path, folders: Sequence[Path]) -> None:
    """Start the arena whose options are in the new run directory `path`.

    Args:
        folders: of the user's datasets that it reads, which must not be changed until it has ended.
    """
    words = arena_command(path)
    Launch("arena", words, time.time(), {"data": {"folders": [str(folder.absolute()) for folder in folders]}}).write(path)
    _spawn(workspace, path, words)


def start_dry_run(workspace: Workspace, task: str, options: Values, path: Path) -> None:
    """Start a dry run in the folder `path` that measures time and memory; it waits in the same queue and is not listed as a run.

    Args:
        options: as for `start`.
    Raises: InputError as `start` does.
    """
    values, _ = validated(workspace, task, options)
    words = [*command(task, values, path.absolute()), "--dry_run"]
    path.mkdir(parents=True)
    _spawn(workspace, path.absolute(), words)


def command(task: str, options: Values, output_dir: Path) -> list[str]:
    """The command that trains `task` with validated `options` into `output_dir`.

    Raises: InputError for a value that cannot be written on a command line.
    """
    # The working directory is the root of a checkout. An installed package has none.
    recipe = RECIPES[task] if IS_CHECKOUT else str(ROOT / RECIPES[task])
    return [*LAUNCHER, recipe, *flags(task, options), "--output_dir", str(output_dir)]


def arena_command(path: Path) -> list[str]:
    """The command that runs the arena in the directory `path`, or goes on with it."""
    return [*ARENA, "--options_file", str(path / ResolvedOptions.NAME), "--output_dir", str(path)]


def resume(workspace: Workspace, run_id: str) -> None:
    """Resume an interrupted, stopped or failed run from its newest checkpoint, or from the start if it has none.

    Raises: InputError if it is active or done, or its images are missing.
    """
    record = workspace.run(run_id)
    with _locked(record):
        view = _checked_view(record, "resume")
        words = _resuming(workspace, view)
        run_requests.forget(record)
        _spawn(workspace, record.path.absolute(), words, from_terminal=view.launch.options is None)


def stop(workspace: Workspace, run_id: str) -> None:
    """Stop a run. A queued run never starts; a training run saves a checkpoint first.

    Raises: InputError if it is not active.
    """
    view = _checked_view(workspace.run(run_id), "stop")
    run_requests.ask(view.record, run_requests.STOP)
    process = view.record.process()
    with suppress(psutil.NoSuchProcess):
        if process is not None and view.state == "running":
            process.terminate()
        elif process is not None:
            _end_all(process)


def ask(workspace: Workspace, run_id: str, what: str) -> None:
    """Request sample images ("sample") or a checkpoint ("save") from a training run at the end of its step.

    Raises: InputError if it is not training.
    """
    if what not in run_requests.ASKED:
        raise InputError(f"The request must be one of {', '.join(run_requests.ASKED)}, got {what!r}.")
    run_requests.ask(_checked_view(workspace.run(run_id), what).record, what)


def duplicate(workspace: Workspace, run_id: str) -> Values:
    """The options of a run that differ from the defaults, to start another run from.

    Raises: InputError if the run has none.
    """
    view = RunView(workspace.run(run_id))
    if view.launch.options is not None:
        return view.launch.options
    if not view.options:
        raise InputError("The options of this run were not recorded. Set up a new run instead.")
    return changed(view.task, view.options)


def delete(workspace: Workspace, run_id: str) -> None:
    """Delete a run permanently; targets of links in it are left alone.

    Raises: InputError if it is active.
    """
    record = workspace.run(run_id)
    with _locked(record):
        _checked_view(record, "delete")
        # Renamed first, so that no other process sees a partly deleted run.
        record.path.rename(record.path.with_name(f"{DELETED}{record.path.name}-{secrets.token_hex(3)}"))
    for folder in workspace.runs.glob(f"{DELETED}*"):
        if not folder.is_symlink():
            shutil.rmtree(folder)


def _resuming(workspace: Workspace, view: RunView) -> list[str]:
    """The command that resumes a run."""
    path = view.record.path.absolute()
    if view.task == "arena":
        return arena_command(path)
    if view.launch.options is not None:
        validated(workspace, view.task, view.launch.options)
        return [*command(view.task, view.launch.options, path), *RESUMING]
    if not view.options:
        raise InputError("This run ended before it recorded its options. Start it again with its original command.")
    processes = view.status.processes or 1
    several = ["--num_processes", str(processes)] if processes > 1 else []
    options = ["--options_file", str(path / ResolvedOptions.NAME), "--output_dir", str(path)]
    return [*LAUNCHER, *several, str(ROOT / RECIPES[view.task]), *options, *RESUMING]


def _checked_view(record: RunRecord, action: str) -> RunView:
    """The current view of the run.

    Raises: InputError if its state does not allow `action`.
    """
    view = RunView(record)
    if action not in view.actions:
        raise InputError(f"{REFUSALS[action]} The run is {view.state}.")
    return view


@contextmanager
def _locked(record: RunRecord) -> Iterator[None]:
    """A lock against two simultaneous requests to resume or delete the run.

    Raises: InputError if another request holds it.
    """
    try:
        with FileLock(record.path / LAUNCHING, timeout=0):
            yield
    except Timeout:
        raise InputError("Another request is starting or deleting this run. Try again in a moment.") from None


def _spawn(workspace: Workspace, path: Path, words: Sequence[str], from_terminal: bool = False) -> None:
    """Start a process that waits in the queue and then runs the command.

    Args:
        from_terminal: its relative paths are those of a terminal's working directory, where runs/ is by default.
    """
    WORKER.free_gpu()
    # Until the process writes a status of its own, so that the page shows the run at once.
    queued = replace(RunRecord(path).status(), state="queued", pid=None, pid_started=None, heartbeat=time.time(), **CLEARED)
    queued.write(path)
    all_runs = workspace.all_runs.absolute()
    folder = ROOT if IS_CHECKOUT and not from_terminal else all_runs.parent
    waiter = [sys.executable, "-P", "-m", "training.runs.waiting", str(path), "--queue", str(all_runs / QUEUE), "--"]
    waiter += _with_launcher(words)
    environment = os.environ | import_path()
    with (path / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{START}{shlex.join(words)}\n")
        log.flush()
        process = subprocess.Popen(
            waiter, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
    # The parent must wait for a child process, or it stays as a zombie.
    threading.Thread(target=process.wait, daemon=True).start()


def _with_launcher(words: Sequence[str]) -> list[str]:
    """The command with this Python environment, regardless of PATH and of the working directory."""
    arguments = words[2:] if tuple(words[:3]) == ARENA else ["accelerate.commands.launch", *words[len(LAUNCHER) :]]
    return [sys.executable, "-P", "-m", *arguments]


def _end_all(process: psutil.Process) -> None:
    """Terminate a queued or starting process and its children, since launchers do not forward signals."""
    # Suspended, so that it starts no further process.
    process.suspend()
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    process.terminate()
    process.resume()
