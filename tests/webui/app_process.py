"""The app as a person starts it: `python app.py` in a process of its own."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from processes import REPOSITORY, address_of, app_command, kill_all_naming, start_process
from worker_thread import launch_thread

from webui.inference_worker import WORKER

# Of the ports from the first on, as many for each of the test processes, none of which takes another's while its server is down.
FIRST_PORT, PORTS = 8100, 200
# The signal at which a forked server writes the stacks of all its threads into its log, and how much of the log is of interest.
STACKS, LOG_TAIL = signal.SIGUSR1, 20_000
# Imported once per test process, by the process that servers are forked from.
PRELOADED = ["webui.page", "webui.security", "webui.inference_jobs"]


class ForkedProcess:
    """`python script` in a fork of a process that has already imported the libraries; the interface is that of Popen."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(target=run_script, args=(command, dict(environment), log))
        with pytest.MonkeyPatch.context() as patch:
            # The process that is forked inherits what torch reads when it is imported.
            for name, value in environment.items():
                patch.setenv(name, value)
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"The server still runs after {timeout} s.")
        return self.poll()


def run_script(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Run the script `command[0]` with its arguments as the main program, in the folder of the repository."""
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    # A test that fails asks for what the server is doing.
    faulthandler.register(STACKS, all_threads=True)
    os.environ.clear()
    os.environ |= environment
    os.chdir(REPOSITORY)
    # Its jobs run in a thread, with the libraries that the fork has already.
    WORKER.launch = launch_thread
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


class AppProcess:
    """A server with folders of its own.

    Args:
        home: holds its runs, its uploads and its log; the folder that it is started in stays the repository.
        options: further options of app.py.
        environment: further variables.
        script: what is started, seen from the repository.
        own_port: on a port that no other test process uses; False for the one that the server chooses.
        forked: from a process that has imported the libraries, which saves seconds. False where the start itself is tested.
    """

    def __init__(
        self,
        home: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        script: str = "app.py",
        own_port: bool = True,
        forked: bool = True,
    ) -> None:
        self.runs, self.uploads, self.log, self._forked = home / "runs", home / "uploads", home / "server.txt", forked
        # A script that does not lie in the repository's root finds its packages too.
        found_in = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": found_in}
        self._environment = {**os.environ, **ours, **(environment or {})}
        port = ["--port", str(free_port())] if own_port else []
        self._command = app_command(home, *port, *options, script=script)
        self.start()

    def start(self) -> None:
        """Start it, and wait until it has printed its address."""
        self.log.write_text("")
        self.process = (ForkedProcess if self._forked else start_process)(self._command, self.log, self._environment)
        try:
            self.url = address_of(self.process, self.log)
        except RuntimeError:
            self.kill()
            raise

    def kill(self) -> None:
        """End it as a power cut would; its runs go on."""
        self.process.kill()
        self.process.wait()

    def describe(self) -> str:
        """The end of its log; of a forked server that runs, with the stacks of its threads."""
        if self._forked and self.process.poll() is None:
            self.process.send_signal(STACKS)
            time.sleep(1.0)
        return self.log.read_text()[-LOG_TAIL:]

    def interrupt(self) -> int:
        """End it as Ctrl-C does; returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)

    def restart(self) -> None:
        """Kill it and start it again, at the same address."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            self.kill()
        kill_all_naming(self.runs)


def free_port() -> int:
    """The first free one of this test process."""
    begin = FIRST_PORT + PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in range(begin, begin + PORTS):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"No port in [{begin}, {begin + PORTS}) is free")
