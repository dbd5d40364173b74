"""What the buttons do to runs: start, resume, stop, ask, duplicate, delete.

A run is the very command that the page shows, as a process of its own that waits for its turn (`training.runs.waiting`); the
server only starts it and reads the run's directory, so that neither needs the other to live.
"""

from __future__ import annotations

import fcntl
import json
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
from pathlib import Path
from typing import Any

import psutil

from pipelines.errors import InputError
from training.runs import run_requests
from training.runs.durable import write_text_atomically
from training.runs.record import OPTIONS, RunRecord
from training.runs.waiting import QUEUE
from webui.run_log import LOG, START, log_tail
from webui.views import STATE_TEXTS, RunView
from webui.workspace import LAUNCH, Workspace

__all__ = ["ask", "command", "delete", "duplicate", "log_tail", "resume", "shown_command", "start", "start_dry_run", "stop"]

ROOT = Path(__file__).parents[1]
RECIPES = {"subject": "training/dreambooth_nora.py", "classify": "training/fewshot_nora.py"}
LAUNCHER = "accelerate"
RESUMING = ["--resume_from_checkpoint", "latest"]
LAUNCHING, DELETED = ".launching", ".deleted-"
PATIENCE_SECONDS = 15.0
NOT_NOW: dict[str, str] = {
    "resume": "Only a run that has ended before its end can go on.",
    "stop": "There is nothing to stop.",
    "sample": "Images can be asked for while a run trains.",
    "save": "A checkpoint can be asked for while a run trains.",
    "delete": "A run that is at work cannot be deleted. Stop it first.",
}
Values = dict[str, dict[str, Any]]


def start(workspace: Workspace, task: str, options: Values) -> str:
    """Start a run; returns its id.

    Args:
        task: "subject" or "classify".
        options: the values that differ from the defaults, by group and field, as in SubjectOptions or FewShotOptions.
    Raises: InputError naming what cannot be used, before anything is written.
    """
    from webui.work import options as page_options

    values = page_options.cleaned(workspace, task, options)
    page_options.built(task, values)
    page_options.flags(task, values)
    path = workspace.new_run().absolute()
    words = command(task, values, path)
    launch = {"task": task, "command": words, "created": time.time(), "options": values}
    write_text_atomically(path / LAUNCH, json.dumps(launch, indent=2) + "\n")
    _spawn(workspace, path, words, ROOT)
    return path.name


def start_dry_run(workspace: Workspace, task: str, options: Values, path: Path) -> None:
    """Have a dry run measure in the folder `path` what a run would take; it waits for its turn, and is no run of its own.

    Args:
        options: as of `start`.
    Raises: InputError as `start`.
    """
    from webui.work import options as page_options

    values = page_options.cleaned(workspace, task, options)
    page_options.built(task, values)
    words = [*command(task, values, path.absolute()), "--dry_run"]
    path.mkdir(parents=True)
    _spawn(workspace, path.absolute(), words, ROOT)


def command(task: str, options: Values, output_dir: Path) -> list[str]:
    """The words of the command that trains `task` with `options`, checked before, into `output_dir`.

    Raises: InputError for a value that a command line cannot say.
    """
    from webui.work import options as page_options

    return [LAUNCHER, "launch", RECIPES[task], *page_options.flags(task, options), "--output_dir", str(output_dir)]


def shown_command(words: Sequence[str]) -> str:
    """The words of a command as one types them."""
    return shlex.join(words)


def resume(workspace: Workspace, run_id: str) -> None:
    """Go on with a run that has ended before its end, from its newest checkpoint, or from its beginning where it has none.

    Raises: InputError if it is at work or done, or its images are no longer there.
    """
    record = workspace.run(run_id)
    with _alone(record):
        view = _allowing(record, "resume")
        words, folder = _resuming(workspace, view)
        run_requests.forget(record)
        _spawn(workspace, record.path.absolute(), words, folder)


def stop(workspace: Workspace, run_id: str) -> None:
    """Stop a run: a queued one never starts, one that trains writes a checkpoint first.

    Raises: InputError if it has ended already.
    """
    record = workspace.run(run_id)
    view = _allowing(record, "stop")
    run_requests.ask(record, run_requests.STOP)
    process = record.process()
    with suppress(psutil.NoSuchProcess):
        if process is not None and view.state == "running":
            process.terminate()
        elif process is not None:
            _end_all(process)


def ask(workspace: Workspace, run_id: str, what: str) -> None:
    """Ask a run that trains for sample images ("sample") or a checkpoint ("save") at the end of its step.

    Raises: InputError if it cannot do that now.
    """
    if what not in run_requests.ASKED:
        raise InputError(f"A run can be asked to {' or '.join(run_requests.ASKED)}, got {what!r}.")
    record = workspace.run(run_id)
    _allowing(record, what)
    run_requests.ask(record, what)


def duplicate(workspace: Workspace, run_id: str) -> Values:
    """The options that a run was started with, those that differ from the defaults, to start another from.

    Raises: InputError if they are not known, or its images are no longer there.
    """
    view = RunView(workspace.run(run_id))
    if "options" in view.launch:
        return view.launch["options"]
    if not view.options:
        raise InputError("What this run was started with is not written down. Start from the first screen.")
    from webui.work import options as page_options

    return page_options.changed(view.task, view.options)


def delete(workspace: Workspace, run_id: str) -> None:
    """Delete a run that is not at work, for good. What its links lead to stays.

    Raises: InputError if it is at work.
    """
    record = workspace.run(run_id)
    with _alone(record):
        _allowing(record, "delete")
        # Beside first, so that nobody sees half a run.
        record.path.rename(record.path.with_name(f"{DELETED}{record.path.name}-{secrets.token_hex(3)}"))
    for left in workspace.runs.glob(f"{DELETED}*"):
        if not left.is_symlink():
            shutil.rmtree(left)


def _resuming(workspace: Workspace, view: RunView) -> tuple[list[str], Path]:
    """The command that goes on with a run, and the folder where it is given."""
    path = view.record.path.absolute()
    if "options" in view.launch:
        from webui.work import options as page_options

        page_options.build(workspace, view.task, view.launch["options"])
        return [*command(view.task, view.launch["options"], path), *RESUMING], ROOT
    if not view.options:
        raise InputError("This run ended before it had written down its options. Start it again from where it was started.")
    processes = view.status.get("processes", 1)
    several = ["--num_processes", str(processes)] if processes > 1 else []
    options = ["--options_file", str(path / OPTIONS), "--output_dir", str(path)]
    # From a terminal folders are given as seen from there, and runs/ is there too unless said.
    words = [LAUNCHER, "launch", *several, str(ROOT / RECIPES[view.task]), *options, *RESUMING]
    return words, workspace.all_runs.absolute().parent


def _allowing(record: RunRecord, action: str) -> RunView:
    """The run as it is now.

    Raises: InputError if `action` is not what can be done with it.
    """
    view = RunView(record)
    if action not in view.actions:
        raise InputError(f"{NOT_NOW[action]} The run is {STATE_TEXTS[view.state]}.")
    return view


@contextmanager
def _alone(record: RunRecord) -> Iterator[None]:
    """Nobody else resumes or deletes the run meanwhile.

    Raises: InputError if somebody is doing so.
    """
    descriptor = os.open(record.path / LAUNCHING, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError("This run is just being started or deleted. Look again in a moment.") from None
    finally:
        os.close(descriptor)


def _spawn(workspace: Workspace, path: Path, words: Sequence[str], folder: Path) -> None:
    """Start a process that waits for its turn and then becomes the command; return when it has said so in the run's status."""
    _make_room()
    queue = workspace.all_runs.absolute() / QUEUE
    waiter = [sys.executable, "-m", "training.runs.waiting", str(path), "--queue", str(queue), "--", *_found(words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with (path / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{START}{shown_command(words)}\n")
        log.flush()
        process = subprocess.Popen(
            waiter, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
    # Whoever starts a process must note its end, or it stays as a zombie.
    threading.Thread(target=process.wait, daemon=True).start()
    record, began = RunRecord(path), time.monotonic()
    while record.status().get("pid") != process.pid and process.poll() is None:
        if time.monotonic() - began > PATIENCE_SECONDS:
            return
        time.sleep(0.02)


def _make_room() -> None:
    """Have models that only draw leave the accelerator, where there is one, to the run."""
    torch, studio = sys.modules.get("torch"), getattr(sys.modules.get("webui.work.pipeline_cache"), "STUDIO", None)
    if torch is not None and studio is not None and torch.cuda.is_available():
        # Not at once: it may be drawing, and the run takes some seconds to load anyway.
        threading.Thread(target=studio.release, daemon=True).start()


def _found(words: Sequence[str]) -> list[str]:
    """The command with the launcher of this Python's environment, whatever the search path says."""
    script = Path(sys.executable).parent / LAUNCHER
    launcher = [str(script)] if script.exists() else [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *words[1 if script.exists() else 2 :]]


def _end_all(process: psutil.Process) -> None:
    """End what waits for its turn or has only just begun: launchers pass no signal on."""
    # Held, so that it starts no further process meanwhile.
    process.suspend()
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    process.terminate()
    process.resume()
