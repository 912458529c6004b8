"""Worker processes that always end with their parent process, and blocks that defer signals."""

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
    """Yield a pool of processes that have each called `start(*args)`.

    They are forked from a server process that has imported the module `preload`, because this process may have threads.
    Only this process handles the signals that end a stage; it then ends the workers. A second signal is deferred until
    they have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Workers inherit the signals that the server ignores.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    processes = ProcessPoolExecutor(workers, context, _start, (start, *args))
    try:
        yield processes
    finally:
        with undisturbed():
            processes.shutdown(cancel_futures=True)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Defer signals until the block ends. This applies only in the main thread, which receives them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {
        number: signal.signal(number, record) for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _start(start: Callable[..., None], *args: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    start(*args)


def _exit_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
