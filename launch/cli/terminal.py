"""The terminal, pipe or file that a command writes to: closed at the start, closed on the way, full, or without some characters."""

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
    """Makes standard output and error such as can be written to, whatever this process was started with: a closed one leads
    nowhere, so that no file takes its number, and a character that the encoding does not have becomes '?'.

    Where standard output cannot be written any more the block ends as by SIGTERM. Ends this process with status 141 where its
    reader is gone, as for `| head`, and raises `PreflightError` where it is full.
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
    """A stream that never fails to write: what cannot be written is lost. ends: the process then gets SIGTERM, so that what it
    started is ended and a step is saved. lost: why, None where nothing was."""

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
            # What the stream still holds goes nowhere as well, and not into an error when Python ends.
            _to_nowhere(self._stream.fileno())
            if self.lost is None:
                self.lost = error
                if self._ends:
                    signal.raise_signal(signal.SIGTERM)


def _to_nowhere(number: int) -> None:
    """Points a file descriptor at /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
