"""Child processes that end when this process ends, even if it is killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies. Use as `preexec_fn` of a child process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_session(process: subprocess.Popen[Any], patience: float, first: signal.Signals = signal.SIGTERM) -> None:
    """End a process that leads its own session, and the rest of its process group: the first signal, then SIGKILL after `patience`
    seconds."""
    for sign, seconds in ((first, patience), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def in_session(leader: int) -> list[psutil.Process]:
    """Return the processes of a session, also if its leader has ended. leader: the leader's process id."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Return the processes whose environment sets the variable to this value, without this process and the ones that started it."""
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own and process.environ().get(name) == value:
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process], patience: float) -> None:
    """Wait up to `patience` seconds for the processes to end, then kill the remaining ones."""
    for left in psutil.wait_procs(list(processes), timeout=patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
