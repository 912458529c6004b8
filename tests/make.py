"""`make`, as a user types it, and virtual environments that it takes for its own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO

LOCKS = ("constraints.txt", "constraints-gpu.txt")
SAY = Path(__file__).with_name("say.py")


def make(*words: str, cwd: Path = REPO, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """`make` as from a shell, even where `make` runs the tests."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *words], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=timeout
    )


def made(folder: Path, lock: str = LOCKS[0]) -> Path:
    """An environment that make takes for one made from `lock`, newer than the lock."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (folder / ".ready").write_text(f"{lock}\n")
    later = max(path.stat().st_mtime for path in (REPO / "pyproject.toml", *(REPO / name for name in LOCKS))) + 1
    os.utime(folder / ".ready", (later, later))
    return folder


def saying(path: Path) -> Path:
    """A stand-in for Python at this path, which prints its words as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {shlex.quote(str(SAY))} "$@"\n')
    path.chmod(0o755)
    return path
