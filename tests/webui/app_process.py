"""The app as a person starts it: `python app.py` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from processes import kill_all

REPOSITORY = Path(__file__).parents[2]
ADDRESS = re.compile(r"NoRA Vision is at (http://\S+)")


class AppProcess:
    """A server with folders of its own.

    Args:
        home: holds its runs, its uploads and its log; the folder that it is started in stays the repository.
        options: further options of app.py.
        environment: further variables.
    """

    def __init__(self, home: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.runs, self.uploads, self.log = home / "runs", home / "uploads", home / "server.txt"
        self._options = options
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
        self.url = ""
        self.start()

    def start(self, patience: float = 240.0) -> None:
        """Start it, and wait until it has told its address; on the old port if it had one."""
        port = ["--port", self.url.rsplit(":", 1)[1].strip("/")] if self.url else []
        command = [sys.executable, "app.py", "--runs_dir", self.runs, "--uploads_dir", self.uploads, *port, *self._options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, env=self._environment, stdout=log, stderr=log)
        end = time.monotonic() + patience
        while time.monotonic() < end and self.process.poll() is None:
            if found := ADDRESS.search(self.log.read_text()):
                self.url = found[1]
                return
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"The server did not start:\n{self.log.read_text()}")

    def kill(self) -> None:
        """End it as a power cut would; its runs go on."""
        self.process.kill()
        self.process.wait()

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
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.runs) in word for word in process.info["cmdline"] or []):
                kill_all(process)
