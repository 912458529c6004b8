"""Timeout by silence: a wait has no time limit as long as the awaited work shows progress."""

import threading
import time
from collections.abc import Callable

_LOOKS_S = 1.0  # shortest time between two looks at the signs


class Silence:
    """A clock of the time since the last progress. signs: returns figures of the work, or None; a change of them is progress."""

    def __init__(self, signs: Callable[[], object]) -> None:
        self._signs = signs
        self._seen: object = None
        self._looking = threading.Lock()
        self._since = self._looked = time.monotonic()

    def broken(self) -> None:
        """Record progress now."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds since the last progress. Thread-safe.

        Only one thread at a time looks at the signs, and only if `broken` was not called recently.
        """
        now = time.monotonic()
        if now - max(self._since, self._looked) >= _LOOKS_S and self._looking.acquire(blocking=False):
            try:
                self._looked = now
                seen = self._signs()
                if None not in (seen, self._seen) and seen != self._seen:
                    self.broken()
                self._seen = seen
            finally:
                self._looking.release()
        return time.monotonic() - self._since
