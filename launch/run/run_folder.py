"""Contract 5: the files of a run under `runs/NAME/`, and how a run resumes after an interruption.

The files are `config.yaml, plan.json, metrics.jsonl, tensorboard/, checkpoints/, hf/, moved.json, likelihood.json, sanity.json,
sglang.log, report.html, checked.json`. `run_state.py` derives the state of the run from them.

A checkpoint counts once it has its record, which is written after every rank has written its part. The embedded engine names
its folder `step_000100`, and only at that time. slime uses Megatron-LM's name for the same checkpoint, `iter_0000099`.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from data_prep.files import sha256, sync_tree, write_text
from data_prep.pack.dataset import Dataset
from recipes import json_file
from recipes.compose.recipe import to_yaml
from recipes.config import Recipe
from recipes.errors import CheckpointError, ConfigError, PreflightError
from recipes.paths import run_folder

RECORD = "limi.json"  # next to a checkpoint's own files: its step, its fixed settings and data, and its files with hashes or sizes
DAMAGED = "damaged_"  # name prefix of a checkpoint that was moved aside


class RunFolder:
    """The folder of one run, with its lock and its checkpoints."""

    def __init__(self, recipe: Recipe, data: Dataset, heldout: Dataset | None) -> None:
        self.recipe = recipe
        self.root = run_folder(recipe)
        self.hf = self.root / "hf"
        keys = {"data": data.manifest["key"], "heldout": heldout and heldout.manifest["key"]}
        self.fixed: dict[str, Any] = {**fixed(recipe), **keys}
        self._lock: TextIO | None = None

    def open(self, fix: Callable[[], None] = lambda: None) -> tuple[int, Path | None, str | None]:
        """Prepare the folder. Return the completed steps, the checkpoint to resume from, and a note for the user.

        fix: further repair of an earlier start's checkpoints, called once this process holds the lock.

        A checkpoint with changed files is moved aside, and the one before it is used. Raise `ConfigError` if the folder holds a
        run of another recipe. Raise `PreflightError` if another process is training the run.
        """
        self.take()
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in (self.root / "checkpoints").glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:  # from an interrupted write
                leftover.unlink()
        fix()
        damaged = self._move_damaged_aside()
        step, last, note = 0, None, None
        if checkpoints := self.checkpoints():
            last = checkpoints[-1]
            record = read_record(last)
            self.compare(record["fixed"])
            step, note = int(record["step"]), f"going on from {last}"
        if damaged:
            note = "; ".join([*damaged, note or "no earlier checkpoint is whole: starting anew"])
        write_text(self.root / "config.yaml", to_yaml(self.recipe))
        return step, last, note

    def _move_damaged_aside(self) -> list[str]:
        """Rename damaged checkpoints, from the newest down to the first intact one. Return one message per renamed checkpoint."""
        messages = []
        for checkpoint in reversed(self.checkpoints()):
            if (fault := damage(checkpoint)) is None:
                break
            aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            messages.append(f"{checkpoint} is damaged ({fault}) and is now {aside.name}")
        return messages

    def set_aside(self) -> Path | None:
        """Rename the folder with a time suffix, so the run restarts at its first step. Return the new path; None if no folder."""
        self.take()
        if not self.root.is_dir():
            return None
        return self.root.rename(self.root.with_name(f"{self.root.name}.{time.strftime('%Y%m%d-%H%M%S')}"))

    def take(self) -> None:
        """Lock the run's name for this process. The lock ends with the process, even after a kill."""
        if self._lock is not None:
            return
        self.root.parent.mkdir(parents=True, exist_ok=True)
        lock = self.root.with_name(f".{self.root.name}.lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise PreflightError(
                f"run={self.recipe.run} is being trained by another process", "wait for it, or write run=OTHER"
            ) from error
        except OSError as error:
            lock.close()
            raise PreflightError(
                f"'{lock.name}' cannot be locked ({error.strerror}), so two commands could train into one folder",
                "mount its file system with locks (Lustre: -o flock), or write cluster.root=FOLDER on another",
            ) from error
        self._lock = lock

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        found = (p.parent for p in self.root.glob(f"checkpoints/[!.]*/{RECORD}"))
        return sorted(c for c in found if not c.name.startswith(DAMAGED))

    def before(self, step: int) -> tuple[int, Path | None]:
        """Return (completed steps, folder) of the last intact checkpoint before step `step`, counted from 1; (0, None) if none."""
        if not self.root.is_dir():
            raise ConfigError(f"there is no run '{self.root}'", f"write run=NAME, one of {self.root.parent}")
        for checkpoint in reversed(self.checkpoints()):
            if damage(checkpoint) is not None:
                continue
            completed = int(read_record(checkpoint)["step"])
            if completed < step:
                return completed, checkpoint
        return 0, None

    def checkpoint(self, step: int) -> Path | None:
        """Return the checkpoint of `step` completed steps, or None."""
        return next((c for c in self.checkpoints() if read_record(c)["step"] == step), None)

    @contextlib.contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """Yield a folder for all ranks to write into. It becomes `step_NNNNNN` if the block ends without an error."""
        target = self.root / "checkpoints" / _name(step)
        scratch = target.with_name(f".{target.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
            with ThreadPoolExecutor(1) as pool:  # sync to disk and hash the files in parallel
                synced = pool.submit(sync_tree, scratch)
                files = _hashes(scratch)
                synced.result()
            self.write_record(scratch, step, files)
            sync_tree(scratch)
            scratch.rename(target)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {error}", self.room()
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.remove_old()

    def write_record(self, checkpoint: Path, step: int, files: Mapping[str, str | int]) -> None:
        """Write the record that makes a checkpoint of `step` completed steps count. files: SHA-256 or size of each file by path."""
        record = {"step": step, "fixed": self.fixed, "files": files}
        write_text(checkpoint / RECORD, json.dumps(record, indent=2) + "\n")

    def remove_old(self) -> None:
        """Remove all but the last `engine.keep_last` checkpoints."""
        for old in self.checkpoints()[: -self.recipe.engine.keep_last]:
            # Hide it first: a partly removed checkpoint must not pass for a complete one.
            # On a network file system, a file that is still open keeps its folder; the next start removes the folder.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")), ignore_errors=True)

    def room(self) -> str:
        """Return the end of an error message: the free disk space, the fix, and the last complete checkpoint."""
        checkpoints = self.checkpoints()
        return (
            f"{shutil.disk_usage(self.root).free / 1e6:,.0f} MB are free under {self.root}; make room there or write "
            f"cluster.root=FOLDER on another disk. {checkpoints[-1] if checkpoints else 'No earlier checkpoint'} is whole"
        )

    def compare(self, there: Mapping[str, Any]) -> None:
        """Raise `ConfigError` if `there`, the fixed settings of an earlier start, differ from this recipe's."""
        different = [f"{k}={there.get(k)} there, {v} here" for k, v in self.fixed.items() if there.get(k) != v]
        if there.get("data") != self.fixed["data"] or there.get("heldout") != self.fixed["heldout"]:
            different.append(
                "a key of packed data covers its trajectories, options, tokenizer, and the code that packs it"
            )
        if different:
            raise another_recipe(self.root, different)


def another_recipe(root: Path, different: Sequence[str]) -> ConfigError:
    """Return the error for a folder of another recipe. different: name, old value and new value of each difference."""
    return ConfigError(
        f"'{root}' holds a run of another recipe ({'; '.join(different)})",
        "write run=OTHER, or anew=true, which moves that folder aside and trains from the first step",
    )


def _name(step: int) -> str:
    return f"step_{step:06}"


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint except its record, by relative path."""
    files = _files(checkpoint)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def sizes(checkpoint: Path) -> dict[str, int]:
    """Return the bytes of every file of a checkpoint except its record, by relative path."""
    return {name: path.stat().st_size for name, path in _files(checkpoint).items()}


def _files(checkpoint: Path) -> dict[str, Path]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != RECORD)
    return {str(p.relative_to(checkpoint)): p for p in files}


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's record. Raise `CheckpointError` if it cannot be read."""
    path, away = checkpoint / RECORD, f"move '{checkpoint}' away: the other checkpoints remain"
    record = json_file.read_json(path, away)
    with json_file.shape(path, away):
        return {**record, "step": int(record["step"]), "fixed": dict(record["fixed"]), "files": dict(record["files"])}


def damage(checkpoint: Path) -> str | None:
    """Return what is damaged in a checkpoint, or None if its files are as they were written."""
    try:
        written = read_record(checkpoint)["files"]
    except CheckpointError:
        return f"its {RECORD} cannot be read"
    by_size = any(isinstance(value, int) for value in written.values())
    there: Mapping[str, str | int] = sizes(checkpoint) if by_size else _hashes(checkpoint)
    different = sorted(name for name in written.keys() | there.keys() if written.get(name) != there.get(name))
    return f"{different[0]} is not the file that was written" if different else None


def fixed(r: Recipe) -> dict[str, Any]:
    """Return, flat, the settings that a run must not change: all that determine its steps and numbers, except the data."""
    optim = {f"optim.{k}": getattr(v, "value", v) for k, v in vars(r.optim).items()}
    model = {f"model.{k}": getattr(v, "value", v) for k, v in vars(r.model).items() if k != "mtp"}
    return {"seed": r.seed, **optim, **model, "engine.dtype": r.engine.dtype.value}


def held(r: Recipe) -> int:
    """Return the bytes of the run's existing checkpoints and export, which the run reuses or replaces.

    Return 0 with `anew`: the old folder is then moved aside, not replaced.
    """
    root = run_folder(r)
    if r.anew:
        return 0
    return sum(sum(sizes(root / name).values()) for name in ("checkpoints", "hf"))


def check_room(recipe: Recipe, needed: float) -> None:
    """Raise `PreflightError` if `cluster.root` has too little space for `needed` bytes."""
    root = Path(recipe.cluster.root)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise PreflightError(
            f"'{root}' has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB (checkpoints and export)",
            "make room there or write cluster.root=FOLDER on another disk",
        )
