"""Report of one cluster node: what it has, and what it can write and read.

These functions run on the node as Ray tasks, with Python's standard library only.
"""

import importlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.slime import installed
from launch.slime.contract import Touch

_IPC_LOCK = 14  # bit of the capability to lock memory without a limit (linux/capability.h)


def report(
    versions: list[str],
    modules: list[str],
    slime_root: str,
    megatron_root: str,
    touches: Sequence[Touch],
    paths: list[str],
) -> dict[str, Any]:
    """Return the node's report.

    versions: distributions whose versions to report. modules: modules to try to import. touches: code of both checkouts that must
    be unchanged. paths: files and folders to look for.
    """
    return {
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in versions},
        "missing": [f"{name} ({fault})" for name in modules if (fault := _import_fault(name))],
        "slime": _commit(slime_root),
        "megatron": _commit(megatron_root),
        "patches": _not_applied(Path(slime_root), megatron_root),
        "broken": installed.broken({"slime": slime_root, "megatron": megatron_root}, touches),
        "unseen": [path for path in paths if not Path(path).exists()],
        "shm": shutil.disk_usage("/dev/shm").free,  # noqa: S108 - Linux's shared memory
        "memlock": _memlock(),
        "infiniband": Path("/dev/infiniband").is_dir(),
        "wandb": bool(os.environ.get("WANDB_API_KEY")),
    }


def write_nonce(folder: str, name: str, nonce: str) -> None:
    """Write the nonce to a file of this name in the folder. It is on the disk when the function returns."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Path(folder, name).open("w", encoding="utf-8") as file:
        file.write(nonce)
        file.flush()
        os.fsync(file.fileno())


def unread(folder: str, nonces: dict[str, str]) -> list[str]:
    """Return the names of the files that do not hold their nonce on this node."""
    # Read by name, not from a listing: a network file system may show an old listing for a minute.
    return [name for name, nonce in nonces.items() if _text(Path(folder, name)) != nonce]


def remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _import_fault(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a package may raise anything when it is imported
        return type(error).__name__
    return ""


def _git(folder: str, *words: str) -> subprocess.CompletedProcess[str]:
    # The checkouts of a container belong to another user, whom git distrusts.
    command = ["git", "-c", "safe.directory=*", "-C", folder, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def _commit(folder: str) -> str:
    """Return the checked-out commit, or the reason why there is none."""
    if not Path(folder).is_dir():
        return f"no folder {folder}"
    done = _git(folder, "rev-parse", "HEAD")
    return done.stdout.strip() if done.returncode == 0 else f"no git checkout in {folder}"


def _not_applied(slime_root: Path, megatron_root: str) -> list[str] | None:
    """Return the names of slime's patches that Megatron-LM lacks; None if no patches or no Megatron-LM are found."""
    patches = sorted(slime_root.glob("docker/patch/latest/megatron*.patch"))
    if not patches or not Path(megatron_root).is_dir():
        return None
    return [p.name for p in patches if _git(megatron_root, "apply", "--reverse", "--check", str(p)).returncode]


def _memlock() -> int | None:
    """Return how many bytes a process may lock in memory; None if there is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("CapEff")
    )
    free = soft == resource.RLIM_INFINITY or int(capabilities.split()[1], 16) >> _IPC_LOCK & 1
    return None if free else soft
