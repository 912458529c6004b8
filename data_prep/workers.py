"""Worker processes that end with the process that started them, whatever ends it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any


def pool(workers: int, preload: str, start: Callable[..., None], *args: Any) -> ProcessPoolExecutor:
    """Processes that have called `start(*args)`, forked from a server that has imported the module `preload`, and not from
    this process, which may have threads. Ctrl-C is for this process, which ends the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # The server hands what it ignores on to the workers.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return ProcessPoolExecutor(workers, context, _start, (start, *args))


def _start(start: Callable[..., None], *args: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start(*args)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
