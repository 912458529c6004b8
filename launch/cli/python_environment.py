"""The Python that runs a command: its version and its packages. Errors name the command that works."""

from __future__ import annotations  # an older Python reads this file too

import os
import shlex
import sys
from pathlib import Path

from recipes.errors import PreflightError

OLDEST = (3, 11)
REPO = Path(__file__).resolve().parents[2]
_OURS = ("data_prep", "launch", "recipes")


def check_python(words: list[str]) -> None:
    """Raise `PreflightError` if this Python is too old for the other files. words: those of the command."""
    if sys.version_info < OLDEST:
        here = ".".join(map(str, sys.version_info[:3]))
        raise PreflightError(
            f"'{sys.executable}' is Python {here}, and {'.'.join(map(str, OLDEST))} is needed", _instead(words)
        )


def complete(words: list[str]) -> bool:
    """Bring the packages that an image of slime lacks, before one of them is imported. Return whether it lacks any.

    words: those of the command. Raise `PreflightError` if they cannot be installed.
    """
    from launch.cluster.image import packages

    if not packages.lacks():
        return False
    # The default is that of `recipes.paths.local_root`, which imports what may be missing.
    roots = [word.partition("=")[2] for word in words if word.startswith("cluster.root=")]
    packages.bring(roots[-1] if roots else str(Path.home() / "limi" if _in_job() else REPO))
    return True


def lacking(error: ImportError, words: list[str]) -> PreflightError:
    """Return the error for a package that is missing or cannot be loaded. Re-raise an error in the project's own files."""
    name = (error.name or "").split(".")[0]
    if name in _OURS:
        raise error
    if isinstance(error, ModuleNotFoundError):
        return PreflightError(f"'{sys.executable}' has no package {name}", _instead(words))
    return PreflightError(f"'{sys.executable}' cannot load {name or 'a package'}: {error}", _instead(words))


def _in_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _instead(words: list[str]) -> str:
    """Return advice: the same command in the environment that `make` sets up."""
    if _in_job():  # the cluster's own Python runs it
        return "install it on every node, or run slime's image there: `make check` lists what is missing"
    python = REPO / ".venv" / "bin" / "python"
    if Path(sys.executable).parent == python.parent:
        return f"`make -C {shlex.quote(str(REPO))} clean setup` makes the environment anew"
    if python.is_file():
        return "run `" + shlex.join([str(python), str(REPO / "launch" / "limi.py"), *words]) + "`"
    stage = [w for w in words if "=" not in w] or ["train"]
    return (
        "run `"
        + shlex.join(["make", "-C", str(REPO), *stage, *(w for w in words if "=" in w)])
        + "`, which sets one up"
    )
