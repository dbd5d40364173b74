"""Which of a tab's drawings were cancelled. Gradio's own cancelling tells the tab of an error, and may come late."""

from __future__ import annotations

import threading
from collections import OrderedDict

MAX_SESSIONS = 10_000


class CancellationTokens:
    """Numbers the drawings of each session, and remembers up to which they were cancelled; nothing else may stop one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[str, int] = OrderedDict()
        self._cancelled: dict[str, int] = {}

    def begin(self, session: str) -> int:
        """The number of a new drawing."""
        with self._lock:
            self._last[session] = self._last.pop(session, 0) + 1
            while len(self._last) > MAX_SESSIONS:
                forgotten, _ = self._last.popitem(last=False)
                self._cancelled.pop(forgotten, None)
            return self._last[session]

    def cancel(self, session: str) -> None:
        """Cancel all drawings of the session that have begun or wait."""
        with self._lock:
            self._cancelled[session] = self._last.get(session, 0)

    def is_cancelled(self, session: str, token: int) -> bool:
        """Whether the drawing `token` is to stop."""
        return token <= self._cancelled.get(session, 0)


CANCELLATIONS = CancellationTokens()
