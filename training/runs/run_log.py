"""A run's log.txt: its last lines, and the error that it ended with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.runs.record import RunRecord

LOG = "log.txt"
# Each start of the run begins with a line with its command.
START = "$ "
TAIL_BYTES, TAIL_LINES = 1 << 16, 200
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ERROR_LINE = re.compile(r"^(?:[\w.-]+\.py: )?error: (?P<message>.+)$")
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit)(?:: .*)?$")
# Errors of the launcher, which only report that its command failed.
LAUNCHER_ERRORS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
SIGNAL = re.compile(r"died with <Signals\.(?P<name>\w+)")


def log_tail(record: RunRecord, lines: int = TAIL_LINES) -> str:
    """The last lines of the run's log as a terminal shows them; empty without a log."""
    return "\n".join(list(_lines(record))[-lines:])


def last_error(record: RunRecord) -> str | None:
    """The error of the run's last start as "Kind: message"; None if it logged none."""
    lines = [line for line in _since_start(record) if not line.startswith(LAUNCHER_ERRORS)]
    for line in reversed(lines):
        if match := ERROR_LINE.match(line):
            # The last line of a recipe or of an argument parser that refuses an option.
            return f"InputError: {match['message']}"
    return next((line for line in reversed(lines) if EXCEPTION.match(line)), None)


def ended_by(record: RunRecord) -> str | None:
    """The signal that ended the run's last start, from the launcher's log; None if there is none."""
    for line in reversed(_since_start(record)):
        if match := SIGNAL.search(line):
            return match["name"]
    return None


def _since_start(record: RunRecord) -> list[str]:
    lines = list(_lines(record))
    starts = [index for index, line in enumerate(lines) if line.startswith(START)]
    return lines[starts[-1] + 1 :] if starts else lines


def _lines(record: RunRecord) -> Iterator[str]:
    """The last lines of the log; of a line that a progress bar has overwritten, the last version."""
    try:
        with (record.path / LOG).open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):
        yield ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])
