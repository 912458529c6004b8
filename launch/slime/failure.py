"""What a start of slime ended by: an error of the project's own as it was raised, others as the log tells them."""

import json
import re
import shutil
from pathlib import Path

from data_prep.files import write_text
from launch.run.run_folder import RunFolder
from recipes import errors
from recipes.errors import CheckpointError, DivergedError, LimiError, TrainError

NAME = "failure.json"
_READ = 4 << 20  # bytes of the log's end that are read
_LINES = 400  # of them in which an error without a name of its own is taken for the cause
_NAMED = ("OutOfMemoryError",)
# Of Megatron, before it updates anything: `found NaN in local grad norm for bucket #0 …`.
_NOT_FINITE = re.compile(r"found (?:NaN|Inf) in local [\w ]+?(?= for | in |'|$)", re.MULTILINE)
_NO_ROOM = re.compile(r"OSError: \[Errno (?:28|30|122)\] .+")  # no space, read-only, over quota
_FULL = 1 << 20  # free bytes under which the log itself may not hold its last lines


def leave(run: Path, error: BaseException) -> None:
    """In slime's driver: writes an error of the project's own where `failure` finds it."""
    if isinstance(error, LimiError):
        said = {"kind": type(error).__name__, "problem": error.problem, "fix": error.fix}
        write_text(run / NAME, json.dumps(said, indent=2) + "\n")


def failure(run: RunFolder, log: Path, since: int, status: int, step: int) -> LimiError:
    """since: bytes that the log had before this start. status: slime's. step: the one it was at, from 1.

    A `TrainError` where another start may come further; another `LimiError` where it would not.
    """
    if (left := run.root / NAME).exists():
        said = json.loads(left.read_text(encoding="utf-8"))
        raised: LimiError = getattr(errors, said["kind"])(said["problem"], said["fix"])
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
    """By the last error that the lines name."""
    causes = [(n, m) for n, line in enumerate(lines) if (m := re.search(r"\b(\w*(?:Error|Exception)): (.+)", line))]
    named = [m for _, m in causes if m[1] in _NAMED]
    late = [m for n, m in causes if n >= len(lines) - _LINES]
    if not (named or late):
        return TrainError(f"slime ended with status {status}{where}")
    found = (named or late)[-1]
    return TrainError(f"slime failed: {found[1]}: {found[2]}{where}")


def _end(log: Path, since: int) -> str:
    """What this start wrote, or the last of it: a long run's log has gigabytes."""
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - _READ))
        return file.read().decode(errors="replace")
