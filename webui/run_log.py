"""A run's log.txt: its end for people, and the sentence that says why it ended."""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.runs.record import RunRecord

LOG = "log.txt"
# A line that each start of the run writes before its own.
START = "$ "
TAIL_BYTES, TAIL_LINES = 1 << 16, 200
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SENTENCE = re.compile(r"^(?:[\w.-]+\.py: )?error: (?P<words>.+)$")
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit)(?:: .*)?$")
# The launcher's own, which only say that its command has ended.
OF_LAUNCHERS = ("subprocess.CalledProcessError", "torch.distributed.elastic")
SIGNAL = re.compile(r"died with <Signals\.(?P<name>\w+)")


def log_tail(record: RunRecord, lines: int = TAIL_LINES) -> str:
    """The last lines of the run's log as a terminal would show them; empty where there is none."""
    return "\n".join(list(_shown(record))[-lines:])


def last_error(record: RunRecord) -> str | None:
    """What the run's last start says went wrong, as "Kind: message"; None if it says nothing."""
    of_start = [line for line in _since_start(record) if not line.startswith(OF_LAUNCHERS)]
    for line in reversed(of_start):
        if match := SENTENCE.match(line):
            # What recipes end with, and what an option that is refused ends in.
            return f"InputError: {match['words']}"
    return next((line for line in reversed(of_start) if EXCEPTION.match(line)), None)


def ended_by(record: RunRecord) -> str | None:
    """The signal that ended the run's last start, as its launcher tells; None if it tells of none."""
    for line in reversed(_since_start(record)):
        if match := SIGNAL.search(line):
            return match["name"]
    return None


def _since_start(record: RunRecord) -> list[str]:
    lines = list(_shown(record))
    starts = [index for index, line in enumerate(lines) if line.startswith(START)]
    return lines[starts[-1] + 1 :] if starts else lines


def _shown(record: RunRecord) -> Iterator[str]:
    """The lines of the log's end; of one that was written over, as bars of progress are, what came last."""
    try:
        with (record.path / LOG).open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):
        yield ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])
