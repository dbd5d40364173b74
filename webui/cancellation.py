"""The cancelled generations of each browser tab. Gradio's own cancelling shows an error in the tab and may come late."""

from __future__ import annotations

import threading
from collections import OrderedDict

MAX_SESSIONS = 10_000


class CancellationTokens:
    """Numbers the generations of each session and records up to which number they were cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: OrderedDict[str, int] = OrderedDict()
        self._cancelled: dict[str, int] = {}

    def begin(self, session: str) -> int:
        """The token of a new generation."""
        with self._lock:
            self._last[session] = self._last.pop(session, 0) + 1
            while len(self._last) > MAX_SESSIONS:
                oldest, _ = self._last.popitem(last=False)
                self._cancelled.pop(oldest, None)
            return self._last[session]

    def cancel(self, session: str) -> None:
        """Cancel all generations of the session that are running or waiting."""
        with self._lock:
            self._cancelled[session] = self._last.get(session, 0)

    def is_cancelled(self, session: str, token: int) -> bool:
        """Whether the generation with this token is cancelled."""
        return token <= self._cancelled.get(session, 0)


CANCELLATIONS = CancellationTokens()
