"""The program inside the sandbox. `sandbox.py` starts it; it uses the standard library only.

It leaves the machine's namespaces, builds a root file system of a few read-only folders and one small folder in memory, and forks
the first process of the new PID namespace. That process gives up all rights and then answers calls, one line of JSON each. Each
call runs in a process of its own: when the call or its time ends, everything that it started is killed. The program imports
nothing of the project, because the project is not visible inside.
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

FOLDER = Path("/scratch")  # the only writable folder
_ROOT = "/proc"  # mount point of the new root: nothing below it is needed
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

# For each architecture: its number in a seccomp filter, and the forbidden system calls. These calls allocate memory that no limit
# counts, reach other processes, or reach rarely used parts of the kernel: shmget msgget semget mq_open memfd_create memfd_secret,
# add_key request_key keyctl, ptrace process_vm_readv process_vm_writev pidfd_getfd, unshare setns mount pivot_root chroot fsopen
# fsmount open_tree move_mount mount_setattr, bpf perf_event_open userfaultfd io_uring_setup, socket.
_COMMON = (447, 438, 428, 429, 430, 432, 442, 425)
_FORBIDDEN: dict[str, tuple[int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, (29, 68, 64, 240, 319, 248, 249, 250, 101, 310, 311, 272, 308, 165, 155, 161, 321, 298, 323,
                            41, *_COMMON)),
    "aarch64": (0xC00000B7, (194, 186, 190, 180, 279, 217, 218, 219, 117, 270, 271, 97, 268, 40, 41, 51, 280, 241, 282,
                             198, *_COMMON)),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _do(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raise `OSError` with the function's name if it fails."""
    if getattr(_libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    _do("mount", *words[:3], ctypes.c_ulong(flags), words[3])


def _build_root(readable: list[str], limits: dict[str, int]) -> None:
    """Build a read-only root in memory, with the folders that Python needs, /dev/null, and the writable `FOLDER`."""
    _mount(None, "/", None, _REC | _PRIVATE)  # later mounts are invisible outside
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
    _do("umount2", b".", _DETACH)  # the old root, which is now stacked on the new one
    os.chdir("/")


def _forbid() -> None:
    """Make the calls of `_FORBIDDEN` fail with EPERM, in this process and all its children."""
    architecture, calls = _FORBIDDEN[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    # x86 has a second set of numbers for the same calls, from 0x40000000.
    tests = [(at_least, 0x40000000), *((equal, number) for number in calls)]
    lines += [(code, len(tests) - n, 0, value) for n, (code, value) in enumerate(tests)]
    lines += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = b"".join(struct.pack("=HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(lines), ctypes.addressof(buffer))
    _do("prctl", _SECCOMP, 2, program, 0, 0)


def _give_up_rights() -> None:
    """Become an unprivileged user without capabilities, with no way to regain any."""
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
    """Return the folder's content as JSON, by path: a file's SHA-256, or the kind of anything else but folders."""
    digests = {}
    for path in sorted(FOLDER.rglob("*")):
        name = path.relative_to(FOLDER).as_posix().encode("utf-8", "replace").decode()
        if path.is_symlink():
            digests[name] = "a link"
        elif path.is_file():
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        elif not path.is_dir():
            digests[name] = "neither file nor folder"
    return json.dumps(digests)


def _work(request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> str:
    """Run a call and return its text; or write the request's files and return the folder's digests."""
    if "call" in request:
        _set_limits(limits)
        return tools.call(*request["call"], FOLDER)
    for path, content in request.get("files", {}).items():
        file = FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8", newline="\n")
    return _digests()


def _child(sink: int, request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> None:
    """Run one request in this process, write its text to `sink`, and exit."""
    status = 1
    try:
        left = memoryview(_work(request, tools, limits).encode())
        while left:
            left = left[os.write(sink, left) :]
        status = 0
    finally:
        os._exit(status)


def _answer(request: dict[str, Any], tools: ModuleType, limits: dict[str, int]) -> dict[str, str]:
    """Run one request in a child process. Return its `text`, or the reason of its failure as `broken`.

    No other process of the namespace is left when it returns.
    """
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
    """Kill and reap every other process of the namespace, and return the child's status.

    patience: seconds to wait for the child to end by itself.
    """
    end, status = time.monotonic() + patience, None
    while status is None and time.monotonic() < end:  # the child has written its last byte and is about to end
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
    """Answer requests from stdin. This is the namespace's first process: everything inside ends with it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _give_up_rights()
    _do("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _say({"ready": True})
    for line in sys.stdin:
        _say(_answer(json.loads(line), tools, limits))


def main() -> None:
    """Set up the namespaces and the root, then serve in a child until it ends."""
    _do("unshare", _NEW_USER | _NEW_NS | _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS)
    _do("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _say({"unshared": True})
    settings = json.loads(sys.stdin.readline())  # sent once the user ids are mapped
    if platform.machine() not in _FORBIDDEN:
        raise OSError(f"no list of system calls for {platform.machine()}")
    spec = importlib.util.spec_from_file_location("tools", settings["tools"])
    assert spec is not None and spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    # Forbid nested user namespaces, as their root would regain rights.
    Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="utf-8")
    _build_root(settings["readable"], settings["limits"])
    first = os.fork()
    if first == 0:
        _serve(tools, settings["limits"])
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    os.close(0)
    os.close(1)  # so that the reader sees the end of output when the first process ends
    os.waitpid(first, 0)  # returns once everything inside has ended


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        _say({"failed": error.strerror if isinstance(error, OSError) and error.strerror else repr(error)})
