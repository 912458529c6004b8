"""Errors of the operating system for the user: the path, the system's message, the option that named the path, and the fix."""

import errno
import os
import shlex
from typing import Any

from recipes.config import Recipe
from recipes.errors import PreflightError
from recipes.paths import REPO

# Options that name a path: the kind of path, and whether a run writes to it.
_OPTIONS = {
    "cluster.root": ("FOLDER", True), "data.out": ("FOLDER", True), "data.path": ("FILE", False), "data.heldout": ("FILE", False),
    "model.checkpoint": ("FOLDER", False), "checkpoint": ("FOLDER", False), "engine.python": ("PYTHON", False),
    "engine.slime_root": ("FOLDER", False), "engine.megatron_root": ("FOLDER", False),
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BROKEN = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# Errors that another path would not fix.
_LIMITS = {
    errno.EMFILE: "raise the limit of open files, and run the same command: ulimit -n 65536",
    errno.ENFILE: "end other programs: the limit of open files is the whole machine's",
    errno.EAGAIN: "raise the limit of processes, and run the same command: ulimit -u 65536",
    errno.EFBIG: "raise the limit of a file's size, and run the same command: ulimit -f unlimited",
    errno.ENOMEM: "end other programs: this machine's memory is used up",
}
_CODE = ("data_prep", "hydra_conf", "launch", "recipes")  # folders of the checkout that commands only read


def named(error: OSError, recipe: Recipe | None) -> PreflightError:
    """Return the error as a message that names the option whose path failed, and the fix.

    recipe: where the options' values are; None if it could not be composed.
    """
    code = error.errno or 0
    says = os.strerror(code) if code else f"{type(error).__name__}: {error}".removesuffix(": ")
    paths = [os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)]
    if not paths:
        return PreflightError(says, _LIMITS.get(code, "make room on the disk" if code in _FULL else ""))
    path = _in_the_way(os.path.abspath(paths[0])) if code in _IN_THE_WAY else os.path.abspath(paths[0])
    if os.path.islink(path) and not os.path.exists(path):
        says = f"{says}: it is a link to '{os.readlink(path)}', which leads nowhere"
    option = None if recipe is None else _option(path, recipe)
    if option is None:
        return PreflightError(f"'{path}': {says}", _LIMITS.get(code) or _elsewhere(path, code))
    name, value = option
    where = f"{name}='{value}'" if os.path.abspath(value) == path else f"'{path}', of {name}={value}"
    return PreflightError(f"{where}: {says}", _LIMITS.get(code) or _mend(name, value, path, code))


def _in_the_way(path: str) -> str:
    """Return the part of the path that is in the way: the first one below an existing folder."""
    while (above := os.path.dirname(path)) != path and not os.path.isdir(above):
        path = above
    return path


def _option(path: str, recipe: Recipe) -> tuple[str, str] | None:
    """Return the option that the path comes from and its value, or None.

    Prefer options that were typed, the innermost one that contains the path first. Otherwise return the outermost option that
    contains the path, because it moves the others too. If none contains the path, return the first option inside it.
    """
    values = {name: value for name in _OPTIONS if (value := _value(recipe, name))}
    whole = {name: os.path.abspath(value) for name, value in values.items()}
    outside = sorted((n for n, v in whole.items() if _within(path, v)), key=lambda n: -len(whole[n]))
    inside = [n for n, v in whole.items() if _within(v, path)]
    typed = {word.partition("=")[0] for word in recipe.overrides}
    for name in (*outside, *inside):
        if name in typed:
            return name, values[name]
    if any(_within(path, str(REPO / folder)) for folder in _CODE):
        return None
    return next(((name, values[name]) for name in (*outside[-1:], *inside)), None)


def _value(recipe: Recipe, option: str) -> str | None:
    """Return the value of an option named with dots."""
    found: Any = recipe
    for name in option.split("."):
        found = getattr(found, name)
    return found


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mend(name: str, value: str, path: str, code: int) -> str:
    """Return the fix for a path that an option names."""
    kind, written = _OPTIONS[name]
    other = f"write {name}={kind}"
    if code in _FULL:
        return f"make room there, or {other} on another disk"
    if code in _BROKEN:
        return f"look at the disk or the file server that it lies on, or {other} on another"
    if code in (errno.EACCES, errno.EPERM) and not written:
        return f"let this user read it, or {other} that can be read"
    if code in _IN_THE_WAY and path != os.path.abspath(value) and _within(path, os.path.abspath(value)):
        return f"move it away, or {other}"
    return f"{other} you can write to" if written else f"{other} that can be read"


def _elsewhere(path: str, code: int) -> str:
    """Return the fix for a path that no option names."""
    if any(_within(path, str(REPO / folder)) for folder in _CODE):
        return f"`git -C {shlex.quote(str(REPO))} status` shows what of the checkout is not as it was"
    fixes = ["make room there"] * (code in _FULL)
    for variable in ("RAY_TMPDIR", "TMPDIR", "HOME"):
        folder = os.environ.get(variable, "")
        if folder not in ("", "/") and _within(path, os.path.abspath(folder)):
            fixes.append(f"set {variable}=FOLDER you can write to, before the command")
            break
    return ", or ".join(fixes)
