"""Packages that slime's images lack. They are installed once into a folder under `cluster.root`; the image's own stay as they are.

Python's standard library only: this runs before anything else can be imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from data_prep.files import whole_folder
from recipes.errors import PreflightError

LOCK = Path(__file__).with_name("packages.txt")
BROUGHT = ("hydra", "omegaconf", "matplotlib")  # import names of what the lock brings; the others are theirs
# Found in every image, so that a Python without one of them is no image's.
_OF_AN_IMAGE = ("ray", "torch", "transformers", "pydantic", "rich", "yaml")
_TAIL = 5  # lines of pip's output in an error


def folder(root: str) -> Path:
    """Return the folder of the packages under `cluster.root`, for this Python and this lock."""
    key = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:8]
    return Path(root) / "packages" / f"python{sys.version_info[0]}.{sys.version_info[1]}-{key}"


def python_path(root: str, *first: str) -> str:
    """Return PYTHONPATH for processes of a job: the given folders, the packages' if they were brought, and this process's own, from
    which Ray itself may be imported."""
    brought, own = folder(root), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*first, *([str(brought)] if brought.is_dir() else []), *filter(None, own)]))


def lacks() -> bool:
    """Return whether this Python is an image's that lacks packages of the lock."""
    return not all(map(_has, BROUGHT)) and all(map(_has, _OF_AN_IMAGE))


def bring(root: str) -> None:
    """Install the packages under `cluster.root` unless they are there, and put their folder on the path of this process.

    Raise `PreflightError` if pip cannot install them.
    """
    there = folder(root)
    if not there.is_dir():
        print(f"installing what this Python lacks, once, into {there}", file=sys.stderr)
        with whole_folder(there) as scratch:
            _install(scratch, there)
    if str(there) not in sys.path:
        sys.path.insert(1, str(there))
        importlib.invalidate_caches()


def _install(scratch: Path, there: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, f"--target={scratch}", f"--requirement={LOCK}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-_TAIL:])
        raise PreflightError(
            f"pip could not install {', '.join(BROUGHT)}, which '{sys.executable}' lacks:\n{tail}",
            "set PIP_INDEX_URL or HTTPS_PROXY in the environment of `ray start`; or, where a package index is in reach, run "
            f"`{' '.join([Path(sys.executable).name, *command[1:]])} --target={there} --requirement={LOCK}` with the image's Python",
        )


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
