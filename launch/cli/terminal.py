"""Standard output and error that are closed, full, or cannot show some characters."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from recipes.errors import PreflightError

_NO_READER = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Make standard output and error writable, whatever this process was started with.

    A closed stream is pointed at /dev/null, so that no opened file gets its number. A character that the encoding lacks becomes '?'.
    If standard output can no longer be written, the block ends as on SIGTERM: the process exits with status 141 if the reader is
    gone (`| head`), and `PreflightError` is raised if the disk is full.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a file of Python's own
    output, errors = Output(sys.stdout, ends=True), Output(sys.stderr, ends=False)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
        output.flush()
    except KeyboardInterrupt:
        if output.lost is None:
            raise
    if output.lost is None:
        return
    if output.lost.errno in _NO_READER:
        raise SystemExit(128 + signal.SIGPIPE)
    raise PreflightError(
        f"standard output cannot be written: {output.lost.strerror}", "make room where it goes, or send it elsewhere"
    )


class Output:
    """A stream whose writes never fail: text that cannot be written is dropped. ends: send SIGTERM to the process then, so that it
    ends what it started and saves a step. lost: the reason, None if nothing was dropped."""

    def __init__(self, stream: TextIO, *, ends: bool) -> None:
        self._stream, self._ends = stream, ends
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Discard what the stream still holds: it would raise an error when Python exits.
            _to_nowhere(self._stream.fileno())
            if self.lost is None:
                self.lost = error
                if self._ends:
                    signal.raise_signal(signal.SIGTERM)


def _to_nowhere(number: int) -> None:
    """Point a file descriptor at /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
