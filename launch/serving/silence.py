"""How long nothing has moved: what is waited for may take as long as it likes, while something comes of it."""

import threading
import time
from collections.abc import Callable

_LOOKS_S = 1.0  # from one look at the signs to the next


class Silence:
    """signs: figures of the work, None where there are none; that they change is a move."""

    def __init__(self, signs: Callable[[], object]) -> None:
        self._signs = signs
        self._seen: object = None
        self._looking = threading.Lock()
        self._since = self._looked = time.monotonic()

    def broken(self) -> None:
        """Something moved."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Any thread may ask; one of them looks at the signs, and not while things move without them."""
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
