"""The app as a person starts it: `python app.py` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from processes import kill_all_naming

REPOSITORY = Path(__file__).parents[2]
ADDRESS = re.compile(r"NoRA Vision is at (http://\S+)")
# Of the ports from the first on, as many for each of the test processes, none of which takes another's while its server is down.
FIRST_PORT, PORTS = 8100, 200


class AppProcess:
    """A server with folders of its own.

    Args:
        home: holds its runs, its uploads and its log; the folder that it is started in stays the repository.
        options: further options of app.py.
        environment: further variables.
        script: what is started, seen from the repository.
        own_port: on a port that no other test process uses; False for the one that the server chooses.
    """

    def __init__(
        self,
        home: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        script: str = "app.py",
        own_port: bool = True,
    ) -> None:
        self.runs, self.uploads, self.log = home / "runs", home / "uploads", home / "server.txt"
        self._script, self._options = script, options
        # A script that does not lie in the repository's root finds its packages too.
        found_in = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        ours = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": found_in}
        self._environment = {**os.environ, **ours, **(environment or {})}
        self.url = ""
        self._port = free_port() if own_port else None
        self.start()

    def start(self, patience: float = 240.0) -> None:
        """Start it, and wait until it has told its address."""
        port = [] if self._port is None else ["--port", str(self._port)]
        command = [sys.executable, self._script, "--runs_dir", self.runs, "--uploads_dir", self.uploads, *port, *self._options]
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
        kill_all_naming(self.runs)


def free_port() -> int:
    """The first free one of this test process."""
    begin = FIRST_PORT + PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in range(begin, begin + PORTS):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"No port in [{begin}, {begin + PORTS}) is free")
