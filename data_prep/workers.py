"""Worker processes that end with the process that started them, whatever ends it; and blocks that no signal cuts short."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that end a stage


@contextlib.contextmanager
def pool(workers: int, preload: str, start: Callable[..., None], *args: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that have called `start(*args)`, forked from a server that has imported the module `preload`, and not from
    this process, which may have threads. Signals that end a stage are for this process, which ends the others; a second one waits
    until it has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # The server hands what it ignores on to the workers.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    processes = ProcessPoolExecutor(workers, context, _start, (start, *args))
    try:
        yield processes
    finally:
        with undisturbed():
            processes.shutdown(cancel_futures=True)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A block that signals wait for, where this is the thread that gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {
        number: signal.signal(number, note) for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _start(start: Callable[..., None], *args: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start(*args)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
