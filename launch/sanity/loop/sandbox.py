"""Tool calls in a protected process: no call can leave its scratch folder or reach a network.

`jail.py` is the program inside. The scratch folder is in memory and ends with the sandbox: nothing is written to a disk.
"""

import contextlib
import json
import os
import platform
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from data_prep.sample import tools
from launch.cluster.processes import end_session
from recipes.errors import SanityError

PROTECTIONS = {
    "user": "a user namespace of its own, an unprivileged user, no capabilities, no new privileges",
    "files": "a root of its own: libraries and interpreter read-only, one writable folder in memory, no /proc, no devices",
    "network": "a network namespace without a device, and no sockets",
    "processes": "a PID namespace whose first process kills all others after every call, and ends with its caller",
    "system calls": "no shared memory, keys, tracing, mounts, namespaces",
    "limits": "limits on time, CPU time, memory, processes, open files, and sizes of files, folder and answer; no core dumps",
    "inherited": "no open files, no environment, a closed input, a session of its own",
}
_JAIL = Path(__file__).with_name("jail.py")
_SLACK_S = 10.0  # extra time for start and answer, beyond a call's own limit
_MAX_LINE = 8_000_000  # bytes of one answer, including its JSON
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")


@dataclass(frozen=True)
class Limits:
    """Limits of one sandbox. Calls can hold at most processes x memory_bytes + folder_bytes of memory."""

    seconds: int = 10  # per call; then everything that it started is killed
    cpu_seconds: int = 10  # per process
    memory_bytes: int = 256 << 20  # address space per process
    processes: int = 16  # at a time
    open_files: int = 64  # per process
    file_bytes: int = 4 << 20
    folder_bytes: int = 32 << 20
    folder_entries: int = 256  # files and folders
    answer_bytes: int = 1 << 20


class Sandbox:
    """A sandbox with one conversation's folder: `with Sandbox(files) as box: box.call(name, arguments)`.

    files: the folder's initial files, content by path. The sandbox's processes end with the block, and with the thread that
    entered it. Raise `SanityError` if the kernel refuses a protection, or if the program inside does not answer; nothing is ever
    run with less protection.
    """

    def __init__(self, files: Mapping[str, str], limits: Limits | None = None) -> None:
        self.files, self.limits = files, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Sandbox":
        python = os.path.realpath(sys.executable)
        self._process = subprocess.Popen(
            [python, "-I", "-S", "-X", "utf8", str(_JAIL)],
            env={},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._expect("unshared", self._read())
            _map_users(self._process.pid)
            settings = {"tools": tools.__file__, "readable": readable(), "limits": asdict(self.limits)}
            self._expect("ready", self._ask(settings))
            self._expect("text", self._ask({"files": dict(self.files)}))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the outer process; everything inside ends with it."""
        assert self._process is not None
        return self._process.pid

    def call(self, name: str, arguments: Any) -> str:
        """Run a tool call and return its text. If the call exceeds a limit, the text starts with `error: `, like the tools' errors."""
        answer = self._ask({"call": [name, arguments]})
        return str(answer["text"]) if "text" in answer else f"error: {answer['broken']}"

    def state(self) -> dict[str, str]:
        """Return the folder's content by path: the SHA-256 of a file, or the kind of anything else but folders."""
        answer = self._ask({"state": True})
        return dict(json.loads(self._expect("text", answer)))

    def close(self) -> None:
        if self._process is not None:
            end_session(self._process, patience=5.0)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            raise SanityError("the sandbox has ended")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail("the process inside has ended")
        return self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next line of output as JSON. Raise `SanityError` if it takes too long or has too many bytes."""
        assert self._process is not None and self._process.stdout is not None
        source = self._process.stdout.fileno()
        end, line = time.monotonic() + self.limits.seconds + _SLACK_S, b""
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    self._fail("it did not answer")
                chunk = os.read(source, 65_536)
                line += chunk
                if not chunk or len(line) > _MAX_LINE:
                    self._fail("its answer is too long" if chunk else "the process inside has ended")
        return dict(json.loads(line))

    def _expect(self, key: str, answer: dict[str, Any]) -> Any:
        if key not in answer:
            self._fail(str(answer.get("failed") or answer.get("broken")))
        return answer[key]

    def _fail(self, why: str) -> None:
        self.close()
        raise SanityError(f"the sandbox of tool calls: {why}")


def readable() -> list[str]:
    """Return the folders, and links to folders, that Python needs; tool calls in the sandbox may read them."""
    wanted = sorted({os.path.realpath(sys.base_prefix), *filter(os.path.exists, _LIBRARIES)})
    return [path for path in wanted if not any(path.startswith(f"{other}/") for other in wanted)]


def _map_users(pid: int) -> None:
    """Map the user inside to an unprivileged user outside: `nobody` if this process runs as root, otherwise this process's user.

    It must not be root, because process limits do not apply to root and root owns many files. The program inside starts as root to
    build its file system, and switches to this user before it answers tool calls.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid != 0:
            Path(f"/proc/{pid}/setgroups").write_text("deny", encoding="utf-8")
        for name, own in (("uid", uid), ("gid", gid)):
            nobody = "65534 65534 1"
            Path(f"/proc/{pid}/{name}_map").write_text(
                f"0 {own} 1\n{nobody}\n" if uid == 0 else f"65534 {own} 1\n", encoding="utf-8"
            )
    except OSError as error:
        raise SanityError(f"the sandbox of tool calls: users cannot be mapped: {error.strerror}") from error


@cache
def available() -> str | None:
    """Return why this machine cannot protect tool calls, or None if a trial call in a sandbox succeeds."""
    if platform.system() != "Linux":
        return f"{platform.system()} has no namespaces"
    try:
        with Sandbox({"try.py": "print('ok')\n"}) as box:
            text = box.call("run", {"command": "python try.py"})
    except SanityError as error:
        return str(error)
    return None if text == "ok" else f"a script inside says: {text}"
