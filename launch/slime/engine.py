"""Driver of the cluster engine: starts slime's own script as a process and monitors it until the last step."""

import contextlib
import json
import os
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from launch.cluster.connection import own_ray
from launch.cluster.processes import end, end_session, end_with_parent, with_variable
from launch.run import metrics, progress
from launch.run.retries import retrying
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.slime import checkpoints, job
from launch.slime.failure import NAME as FAILURE
from launch.slime.failure import failure
from recipes.config import Recipe
from recipes.errors import TrainError
from recipes.paths import REPO, in_ray_job

LOG = "train.log"  # output of slime and its processes; every start appends
_POLL_S = 0.5

DRIVER = REPO / "launch" / "slime" / "hooks" / "driver.py"


def train_through_slime(plan: Plan, run: RunFolder, console: Console) -> Path:
    """Train from the last complete checkpoint (or the base) to the last step. Return the last checkpoint.

    After a failure, training restarts from the last checkpoint, by the rules of `launch.run.retries`. Raise `TrainError` if it cannot
    continue.
    """
    return retrying(lambda: _attempt(plan, run, console), plan.recipe, run.root, console)


def _attempt(plan: Plan, run: RunFolder, console: Console) -> Path:
    total = plan.schedule.num_steps
    completed, checkpoint, note = run.open(partial(checkpoints.remove_parts, run))
    if note:
        console.print(note)
    if completed < total:
        plan.write(run.root / "plan.json")
        job.write_job(plan.recipe, total, checkpoints.go_on_from(run, checkpoint))
        start(plan.recipe, run, completed, total, console)
        checkpoints.settle(run)
    last = run.checkpoint(total)
    if last is None:
        raise TrainError(f"slime ended without a checkpoint of step {total}", f"see {run.root / LOG}")
    return last


def start(recipe: Recipe, run: RunFolder, completed: int, total: int, console: Console) -> None:
    """Start slime once on the `job.json` in the run folder, and wait for it. It trains from `completed` steps to `total`.

    Raise `TrainError` if slime does not reach `total`, and `CheckpointError` if the disk is full.
    """
    path = run.root / metrics.NAME
    metrics.keep(path, completed)
    (run.root / FAILURE).unlink(missing_ok=True)  # from an earlier start
    console.print(f"slime's log: {run.root / LOG}")
    lines = Lines(path)
    with Slime(run) as slime, progress.training(console, total, completed) as advance:
        last_output, log_size = time.monotonic(), slime.logged
        while True:
            status = slime.status()
            for line in lines.read():
                last_output = time.monotonic()
                if "loss" in line:
                    advance(line)
            checkpoints.settle(run)
            if status is not None:
                break
            # Compare sizes, not modification times: a file server's clock may be off by more than the limit.
            if (size := (run.root / LOG).stat().st_size) != log_size:
                last_output, log_size = time.monotonic(), size
            if time.monotonic() - last_output > recipe.engine.timeout:
                raise TrainError(
                    f"slime said nothing for engine.timeout={recipe.engine.timeout} s",
                    f"raise engine.timeout, or read {run.root / LOG}",
                )
            time.sleep(_POLL_S)
    reached = metrics.completed(run.root)
    if status:
        raise failure(run, run.root / LOG, slime.logged, status, reached + 1)
    if reached != total:
        raise TrainError(f"slime ended after step {reached} of {total} without an error", f"see {run.root / LOG}")


class Lines:
    """The lines that are added to a metrics file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines added since the last call. A line that another node has not finished is left for the next call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.seen)
            new = file.read()
        parsed = []
        for line in new[: new.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                parsed.append(json.loads(line))
            except ValueError:  # a network file system may show zeros before it shows the line
                break
            self.seen += len(line)
        return parsed


class Slime:
    """A context that runs slime's driver. However it is left, the driver and all processes that it started here are ended."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.logged = 0  # size of the log in bytes before this start
        self._started: set[psutil.Process] = set()

    def __enter__(self) -> "Slime":
        # A killed command may have left processes: Megatron's writers wait for a parent that is gone.
        end(with_variable(job.RUN, str(self.run.root)), patience=0.0)
        python = str(self.run.recipe.engine.python)
        job_json = json.loads((self.run.root / "job.json").read_text(encoding="utf-8"))
        own = {} if in_ray_job() else own_ray()
        with (self.run.root / LOG).open("ab") as log:
            self.logged = log.tell()
            self._process = subprocess.Popen(
                [python, str(DRIVER), str(self.run.root)],
                env={**own, **os.environ, **job_json["env_vars"]},
                cwd=self.run.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the driver runs no thread that holds a lock here
            )
        return self

    def status(self) -> int | None:
        """Return the driver's exit status, or None while it runs."""
        if self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._started.update(psutil.Process(self._process.pid).children(recursive=True))
        return self._process.returncode

    def __exit__(self, *_: object) -> None:
        # On SIGTERM, Ray's driver also ends Ray's own processes.
        end_session(self._process, patience=15.0)
        end(self._started, patience=10.0)
