"""Processes that end with this one, however it ends."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable

import psutil

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """For a child's start: asks the kernel to end it should its parent die without ending it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_session(process: subprocess.Popen[bytes], patience: float) -> None:
    """Ends a process that leads a session of its own, with the session: SIGTERM, and SIGKILL after `patience` seconds."""
    for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def in_session(leader: int) -> list[psutil.Process]:
    """The processes of the session that this process led, whether it still runs or not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process], patience: float) -> None:
    """Waits so many seconds for processes to end, and ends those that did not."""
    for left in psutil.wait_procs(list(processes), timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
