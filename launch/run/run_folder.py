"""Contract 5: what a run leaves under `runs/NAME/`, and how it goes on after an interruption.

`config.yaml, plan.json, metrics.jsonl, tensorboard/, checkpoints/, hf/, moved.json, likelihood.json, sanity.json, sglang.log,
report.html, checked.json`; `run_state.py` tells how far it has come. A checkpoint counts when it has its record, which is written
when every rank has written its part: `step_000100` of the embedded engine, which gets its name then, `iter_0000099`, Megatron-LM's
name for it, of slime.
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

RECORD = "limi.json"  # beside a checkpoint's own files: its step, what it was trained on, and what its files were
DAMAGED = "damaged_"  # begins the name of a checkpoint that was set aside


class RunFolder:
    def __init__(self, recipe: Recipe, data: Dataset, heldout: Dataset | None) -> None:
        self.recipe = recipe
        self.root = run_folder(recipe)
        self.hf = self.root / "hf"
        keys = {"data": data.manifest["key"], "heldout": heldout and heldout.manifest["key"]}
        self.fixed: dict[str, Any] = {**fixed(recipe), **keys}
        self._lock: TextIO | None = None

    def open(self, fix: Callable[[], None] = lambda: None) -> tuple[int, Path | None, str | None]:
        """Makes the folder ready: the steps completed so far, the checkpoint to go on from, and what to tell the user.

        fix: what else puts an earlier start's checkpoints in order, once no other process is at them.

        A checkpoint whose files are not those that were written is moved aside, and the one before it taken. Raises `ConfigError`
        where a run of another recipe is there, and `PreflightError` where another process is at it.
        """
        self.take()
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in (self.root / "checkpoints").glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:  # of a write that was cut short
                leftover.unlink()
        fix()
        damaged = self._set_aside_damaged()
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

    def _set_aside_damaged(self) -> list[str]:
        """Renames the newest checkpoints that are not as they were written, down to the first that is; what to say of them."""
        said = []
        for checkpoint in reversed(self.checkpoints()):
            if (fault := damage(checkpoint)) is None:
                break
            aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            said.append(f"{checkpoint} is damaged ({fault}) and is now {aside.name}")
        return said

    def set_aside(self) -> Path | None:
        """Gives the folder a name with the time, so that the run begins with its first step; that name, None where there was none."""
        self.take()
        if not self.root.is_dir():
            return None
        return self.root.rename(self.root.with_name(f"{self.root.name}.{time.strftime('%Y%m%d-%H%M%S')}"))

    def take(self) -> None:
        """Holds the run's name for this process; the lock goes with the process, however it ends."""
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
                f"'{lock.name}' cannot be locked ({error.strerror}), so that two commands could train into one folder",
                "mount its file system with locks (Lustre: -o flock), or write cluster.root=FOLDER on another",
            ) from error
        self._lock = lock

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = (p.parent for p in self.root.glob(f"checkpoints/[!.]*/{RECORD}"))
        return sorted(c for c in found if not c.name.startswith(DAMAGED))

    def before(self, step: int) -> tuple[int, Path | None]:
        """Of an earlier start, the last whole checkpoint before step `step` (the first is 1) and its completed steps."""
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
        """The checkpoint of `step` completed steps, where there is one."""
        return next((c for c in self.checkpoints() if read_record(c)["step"] == step), None)

    @contextlib.contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder for all ranks to write into, which becomes `step_NNNNNN` when the block ends without an error."""
        target = self.root / "checkpoints" / _name(step)
        scratch = target.with_name(f".{target.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
            with ThreadPoolExecutor(1) as pool:  # the disk writes while the files are hashed
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
        """Makes a checkpoint of `step` completed steps count. files: by path, the SHA-256 or the size of each."""
        record = {"step": step, "fixed": self.fixed, "files": files}
        write_text(checkpoint / RECORD, json.dumps(record, indent=2) + "\n")

    def remove_old(self) -> None:
        """Leaves the last `engine.keep_last` checkpoints."""
        for old in self.checkpoints()[: -self.recipe.engine.keep_last]:
            # Out of sight first: one half removed must not pass for whole.
            # On a network file system a file that is still open leaves its folder behind; the next start removes that.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")), ignore_errors=True)

    def room(self) -> str:
        """How much the disk has left, and where to go: the end of an error message."""
        kept = self.checkpoints()
        return (
            f"{shutil.disk_usage(self.root).free / 1e6:,.0f} MB are free under {self.root}; make room there or write "
            f"cluster.root=FOLDER on another disk. {kept[-1] if kept else 'No earlier checkpoint'} is whole"
        )

    def compare(self, there: Mapping[str, Any]) -> None:
        """Raises `ConfigError` where `there`, of an earlier start, is not what this one must keep."""
        different = [f"{k}={there.get(k)} there, {v} here" for k, v in self.fixed.items() if there.get(k) != v]
        if there.get("data") != self.fixed["data"] or there.get("heldout") != self.fixed["heldout"]:
            different.append(
                "keys of packed sets, made of trajectories, options, tokenizer, and the code that packs them"
            )
        if different:
            raise another_recipe(self.root, different)


def another_recipe(root: Path, different: Sequence[str]) -> ConfigError:
    """different: name, value there and value here of each that a run keeps."""
    return ConfigError(
        f"'{root}' holds a run of another recipe ({'; '.join(different)})",
        "write run=OTHER, or anew=true, which moves that folder aside and trains from the first step",
    )


def _name(step: int) -> str:
    return f"step_{step:06}"


def _hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its record, by its path inside."""
    files = _files(checkpoint)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves other threads their cores
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its record, by its path inside."""
    return {name: path.stat().st_size for name, path in _files(checkpoint).items()}


def _files(checkpoint: Path) -> dict[str, Path]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != RECORD)
    return {str(p.relative_to(checkpoint)): p for p in files}


def read_record(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's record. Raises `CheckpointError` where it cannot be read."""
    path, away = checkpoint / RECORD, f"move '{checkpoint}' away: the other checkpoints stay"
    record = json_file.read(path, away)
    with json_file.shape(path, away):
        return {**record, "step": int(record["step"]), "fixed": dict(record["fixed"]), "files": dict(record["files"])}


def damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written."""
    try:
        written = read_record(checkpoint)["files"]
    except CheckpointError:
        return f"its {RECORD} cannot be read"
    by_size = any(isinstance(value, int) for value in written.values())
    there: Mapping[str, str | int] = sizes(checkpoint) if by_size else _hashes(checkpoint)
    different = sorted(name for name in written.keys() | there.keys() if written.get(name) != there.get(name))
    return f"{different[0]} is not the file that was written" if different else None


def fixed(r: Recipe) -> dict[str, Any]:
    """What of the recipe a run must not change, flat: everything but the data that decides the steps and the numbers."""
    optim = {f"optim.{k}": getattr(v, "value", v) for k, v in vars(r.optim).items()}
    model = {f"model.{k}": getattr(v, "value", v) for k, v in vars(r.model).items() if k != "mtp"}
    return {"seed": r.seed, **optim, **model, "engine.dtype": r.engine.dtype.value}


def held(r: Recipe) -> int:
    """Bytes of the checkpoints and the export that a run of this name has on the disk: what it goes on with, and replaces. With
    `anew` they stay."""
    root = run_folder(r)
    if r.anew:
        return 0
    return sum(sum(sizes(root / name).values()) for name in ("checkpoints", "hf"))


def check_room(recipe: Recipe, needed: float) -> None:
    """Refuses to start where `cluster.root` has not room for `needed` bytes."""
    root = Path(recipe.cluster.root)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise PreflightError(
            f"'{root}' has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB (checkpoints and export)",
            "make room there or write cluster.root=FOLDER on another disk",
        )
