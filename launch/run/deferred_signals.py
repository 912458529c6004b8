"""SIGTERM (a scheduler takes its machines back) and SIGHUP (the terminal closes) during training: the step ends and is saved first."""

import signal
from types import FrameType


class DeferredSignals:
    """A context in which SIGTERM and SIGHUP do not end the process. received: the name of the last signal, or None."""

    def __enter__(self) -> "DeferredSignals":
        self.received: str | None = None
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous_handlers = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
