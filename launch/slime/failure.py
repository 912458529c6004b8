"""The cause of a failed start of slime: one of the project's own errors as it was raised, or else an error found in the log."""

import json
import re
import shutil
from pathlib import Path

from data_prep.files import write_text
from launch.run.run_folder import RunFolder
from recipes import errors
from recipes.errors import CheckpointError, DivergedError, LimiError, TrainError

NAME = "failure.json"
_READ = 4 << 20  # bytes read from the end of the log
_LINES = 400  # last lines in which any error counts as the cause
_NAMED = ("OutOfMemoryError",)  # errors that count as the cause anywhere in the bytes read
# Megatron's message before it updates anything: `found NaN in local grad norm for bucket #0 …`.
_NOT_FINITE = re.compile(r"found (?:NaN|Inf) in local [\w ]+?(?= for | in |'|$)", re.MULTILINE)
_NO_ROOM = re.compile(r"OSError: \[Errno (?:28|30|122)\] .+")  # no space, read-only, over quota
_FULL = 1 << 20  # with fewer free bytes, the log may have lost its last lines


def leave(run: Path, error: BaseException) -> None:
    """Write one of the project's own errors to the run folder, for `failure`. Ignore other errors. Called by slime's driver."""
    if isinstance(error, LimiError):
        record = {"kind": type(error).__name__, "problem": error.problem, "fix": error.fix}
        write_text(run / NAME, json.dumps(record, indent=2) + "\n")


def failure(run: RunFolder, log: Path, since: int, status: int, step: int) -> LimiError:
    """Return the error that describes a failed start of slime.

    since: size of the log in bytes before this start. status: slime's exit status. step: the step that failed, from 1. Return a
    `TrainError` if another start may get further, and another `LimiError` if it would not.
    """
    if (path := run.root / NAME).exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        raised: LimiError = getattr(errors, record["kind"])(record["problem"], record["fix"])
        return raised
    text = _end(log, since)
    lines = text.splitlines()
    where = "\nThe end of {}:\n{}".format(log, "\n".join(lines[-15:]))
    if found := _NO_ROOM.search(text):
        return CheckpointError(f"slime failed: {found[0]}", run.room())
    if shutil.disk_usage(run.root).free < _FULL:
        return CheckpointError(f"slime ended with status {status} and the disk is full", run.room())
    if found := _NOT_FINITE.search(text):
        return DivergedError(
            f"step {step}: Megatron {found[0]}, which was not applied",
            f"try a smaller optim.lr with run=OTHER, or see {log}",
        )
    return _raised(lines, status, log, where)


def _raised(lines: list[str], status: int, log: Path, where: str) -> LimiError:
    """Return a `TrainError` for the last error named in the lines. where: the end of the log, for the message."""
    causes = [(n, m) for n, line in enumerate(lines) if (m := re.search(r"\b(\w*(?:Error|Exception)): (.+)", line))]
    named = [m for _, m in causes if m[1] in _NAMED]
    late = [m for n, m in causes if n >= len(lines) - _LINES]
    if not (named or late):
        return TrainError(f"slime ended with status {status}{where}")
    found = (named or late)[-1]
    return TrainError(f"slime failed: {found[1]}: {found[2]}{where}")


def _end(log: Path, since: int) -> str:
    """Return this start's part of the log, at most the last `_READ` bytes: the log of a long run has gigabytes."""
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - _READ))
        return file.read().decode(errors="replace")
