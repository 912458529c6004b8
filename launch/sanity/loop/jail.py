"""The inside of the sandbox: a program of its own, started by `sandbox.py` with the standard library alone.

It leaves the machine's namespaces, builds a root of a few read-only folders and one small folder in memory, and forks the
first process of the new PID namespace. That one gives up every right and then answers calls, a line of JSON each, with a
process a call: when the call ends, or its time, everything that it started is killed. It imports nothing of the project,
as none of it can be seen inside.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path("/scratch")  # the only one that can be written to
_ROOT = "/proc"  # where the new root is mounted: nothing that is needed lies below it
_NOBODY = 65534
_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # on every architecture
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38

# Of each architecture: its number in a filter, and the calls that are refused. They hold memory that no limit counts, reach
# other processes or the kernel's rarer parts: shmget msgget semget mq_open memfd_create memfd_secret, add_key request_key
# keyctl, ptrace process_vm_readv process_vm_writev pidfd_getfd, unshare setns mount pivot_root chroot fsopen fsmount
# open_tree move_mount mount_setattr, bpf perf_event_open userfaultfd io_uring_setup, socket.
_COMMON = (447, 438, 428, 429, 430, 432, 442, 425)
_FORBIDDEN: dict[str, tuple[int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, (29, 68, 64, 240, 319, 248, 249, 250, 101, 310, 311, 272, 308, 165, 155, 161, 321, 298, 323,
                            41, *_COMMON)),
    "aarch64": (0xC00000B7, (194, 186, 190, 180, 279, 217, 218, 219, 117, 270, 271, 97, 268, 40, 41, 51, 280, 241, 282,
                             198, *_COMMON)),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _do(name: str, *arguments: Any) -> None:
    """Calls the C library. Raises `OSError` that names the call."""
    if getattr(_libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    _do("mount", *words[:3], ctypes.c_ulong(flags), words[3])


def _build_root(readable: list[str], limits: dict[str, int]) -> None:
    """A root in memory, read-only, with the folders that Python needs, /dev/null, and `FOLDER`."""
    _mount(None, "/", None, _REC | _PRIVATE)  # nothing mounted from here on shows outside
    _mount("tmpfs", _ROOT, "tmpfs", _NOSUID, "size=64k,nr_inodes=256,mode=755")
    for path in readable:
        place = Path(_ROOT + path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            place.symlink_to(os.readlink(path))
            continue
        place.mkdir()
        _mount(path, str(place), None, _BIND | _REC)
        attributes = (ctypes.c_uint64 * 4)(_RDONLY | _NOSUID | _NODEV, 0, 0, 0)
        _do("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, str(place).encode(), _AT_RECURSIVE, attributes, 32)
    null = Path(_ROOT, "dev/null")
    null.parent.mkdir()
    null.touch()
    _mount("/dev/null", str(null), None, _BIND)
    scratch = _ROOT + str(FOLDER)
    os.mkdir(scratch)
    options = f"size={limits['folder_bytes']},nr_inodes={limits['folder_entries']},uid={_NOBODY},gid={_NOBODY},mode=700"
    _mount("tmpfs", scratch, "tmpfs", _NOSUID | _NODEV, options)
    _mount(None, _ROOT, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(_ROOT)
    _do("pivot_root", b".", b".")
    _do("umount2", b".", _DETACH)  # the old root, which lies over the new one now
    os.chdir("/")


def _forbid() -> None:
    """Ends the right to make the calls of `_FORBIDDEN`, here and in every process to come: they fail with EPERM."""
    architecture, calls = _FORBIDDEN[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    # From 0x40000000 on lies x86's second set of numbers for the same calls.
    tests = [(at_least, 0x40000000), *((equal, number) for number in calls)]
    lines += [(code, len(tests) - n, 0, value) for n, (code, value) in enumerate(tests)]
    lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = b"".join(struct.pack("=HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(lines), ctypes.addressof(buffer))
    _do("prctl", _SECCOMP, 2, program, 0, 0)


def _give_up_rights() -> None:
    """An unprivileged user without capabilities, and no way back to any."""
    if os.getuid() == 0:
        os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _do("capset", header, (ctypes.c_uint32 * 6)())
    _do("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _do("prctl", _DUMPABLE, 0, 0, 0, 0)
    _forbid()


def _set_limits(limits: dict[str, int]) -> None:
    for name, value in (
        ("CPU", limits["cpu_seconds"]), ("AS", limits["memory_bytes"]), ("FSIZE", limits["file_bytes"]),
        ("NOFILE", limits["open_files"]), ("NPROC", limits["processes"]), ("CORE", 0), ("MEMLOCK", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _digests() -> str:
    """What lies in the folder, by path, as JSON: a file's SHA-256, and what else there is by its kind."""
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        name = path.relative_to(FOLDER).as_posix().encode("utf-8", "replace").decode()
        if path.is_symlink():
            found[name] = "a link"
        elif path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        elif not path.is_dir():
            found[name] = "neither file nor folder"
    return json.dumps(found)


def _work(request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> str:
    if "call" in request:
        _set_limits(limits)
        return tools.call(*request["call"], FOLDER)
    for path, content in request.get("files", {}).items():
        file = FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8", newline="\n")
    return _digests()


def _child(sink: int, request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> None:
    """The process of one call: writes its text and ends."""
    status = 1
    try:
        left = memoryview(_work(request, tools, limits).encode())
        while left:
            left = left[os.write(sink, left) :]
        status = 0
    finally:
        os._exit(status)


def _answer(request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> dict[str, str]:
    """`text`, or `broken` with why there is none; no other process of the namespace is left."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        _child(sink, request, tools, limits)
    os.close(sink)
    end, output, broken = time.monotonic() + limits["seconds"], b"", ""
    while True:
        if not select.select([source], [], [], max(0.0, end - time.monotonic()))[0]:
            broken = f"timed out after {limits['seconds']} s"
            break
        chunk = os.read(source, 65_536)
        output += chunk
        if len(output) > limits["answer_bytes"]:
            broken = "too much output"
        if not chunk or broken:
            break
    os.close(source)
    status = _end_all(child, patience=0.0 if broken else 1.0)
    if not broken and status != 0:
        broken = f"the call was ended with status {status}"
    return {"broken": broken} if broken else {"text": output.decode("utf-8", "replace")}


def _end_all(child: int, patience: float) -> int:
    """The child's status, after every process of the namespace but this one is dead and reaped."""
    end, status = time.monotonic() + patience, None
    while status is None and time.monotonic() < end:  # it wrote its last byte and is about to end by itself
        pid, raw = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(raw) if pid else None
        time.sleep(0.0002)
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            pid, raw = os.waitpid(-1, 0)
        except ChildProcessError:
            return -signal.SIGKILL if status is None else status
        if pid == child:
            status = os.waitstatus_to_exitcode(raw)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _serve(tools: ModuleType, limits: dict[str, int]) -> None:
    """The first process of the namespace: with it everything inside ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _give_up_rights()
    _do("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _say({"ready": True})
    for line in sys.stdin:
        _say(_answer(json.loads(line), tools, limits))


def main() -> None:
    _do("unshare", _NEW_USER | _NEW_NS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS)
    _do("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _say({"unshared": True})
    settings = json.loads(sys.stdin.readline())  # comes when the user ids are mapped
    if platform.machine() not in _FORBIDDEN:
        raise OSError(f"no list of system calls for {platform.machine()}")
    spec = importlib.util.spec_from_file_location("tools", settings["tools"])
    assert spec is not None and spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    # None inside this one, whose root would have rights again.
    Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="utf-8")
    _build_root(settings["readable"], settings["limits"])
    first = os.fork()
    if first == 0:
        _serve(tools, settings["limits"])
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    os.close(0)
    os.close(1)  # so that the reader sees the end with the first process's
    os.waitpid(first, 0)  # returns when everything inside has ended


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        _say({"failed": error.strerror if isinstance(error, OSError) and error.strerror else repr(error)})
