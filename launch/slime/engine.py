"""Driver of the cluster engine: starts slime's own script as a process and monitors it until the last step."""

import contextlib
import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console

from launch.cluster.connection import own_ray
from launch.cluster.processes import end, end_session, end_with_parent, with_variable
from launch.run import metrics, progress, run_state, which_run
from launch.run.deferred_signals import DeferredSignals
from launch.run.retries import retrying
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.slime import checkpoints, job
from launch.slime.failure import NAME as FAILURE
from launch.slime.failure import failure
from launch.slime.hooks import nodes, stop
from launch.slime.watch import LOG, Watch
from recipes.config import Recipe
from recipes.errors import TrainError
from recipes.paths import REPO, in_ray_job

_POLL_S = 0.5

DRIVER = REPO / "launch" / "slime" / "hooks" / "driver.py"


def train_through_slime(plan: Plan, run: RunFolder, console: Console) -> Path | None:
    """Train from the last complete checkpoint (or the base) to the last step. Return the last step's checkpoint, or None if SIGTERM or
    SIGHUP stopped training after an earlier step.

    After a failure, training restarts from the last checkpoint, by the rules of `launch.run.retries`. Raise `TrainError` if it cannot
    continue.
    """
    return retrying(lambda: _attempt(plan, run, console), plan.recipe, run.root, console)


def _attempt(plan: Plan, run: RunFolder, console: Console) -> Path | None:
    total = plan.schedule.num_steps
    completed, checkpoint, note = run.open(partial(checkpoints.remove_parts, run))
    if note:
        console.print(note)
    if completed < total:
        run_state.refuse_weights_alone(checkpoint, plan.recipe)
        plan.write(run.root / "plan.json")
        job.write_job(plan.recipe, total, checkpoints.go_on_from(run, checkpoint))
        signalled = start(plan.recipe, run, completed, total, console)
        checkpoints.settle(run)
        if signalled:
            done = max((step for step in which_run.whole(run.root)), default=0)
            console.print(f"{signalled}: saved after step {done} of {total}; run the same command to continue")
            return None
    last = run.checkpoint(total)
    if last is None:
        raise TrainError(f"slime ended without a checkpoint of step {total}", f"see {run.root / LOG}")
    return last


def start(recipe: Recipe, run: RunFolder, completed: int, total: int, console: Console) -> str | None:
    """Start slime once on the `job.json` in the run folder, and wait for it. It trains from `completed` steps to `total`.

    SIGTERM and SIGHUP let the current step end and save; return the signal's name then, otherwise None. Raise `TrainError` if slime
    does not reach `total`, and `CheckpointError` if the disk is full.
    """
    metrics.keep(run.root / metrics.NAME, completed)
    for left in (FAILURE, stop.REQUEST, nodes.SHORTAGE):  # from an earlier start
        (run.root / left).unlink(missing_ok=True)
    console.print(f"slime's log: {run.root / LOG}")
    with DeferredSignals() as signals, Slime(run) as slime, progress.training(console, total, completed) as advance:
        status = _watched(Watch(recipe, run, total, console, advance), slime, signals)
    reached = metrics.completed(run.root)
    if status == stop.STATUS and signals.received:
        return signals.received
    if status and signals.received:  # the scheduler ended the trainers too
        raise KeyboardInterrupt(
            f"{signals.received} ended slime after step {reached}; run the same command to go on from the last checkpoint"
        )
    if status:
        raise failure(run, run.root / LOG, slime.logged, status, reached + 1)
    if reached != total:
        raise TrainError(f"slime ended after step {reached} of {total} without an error", f"see {run.root / LOG}")
    return None


def _watched(watch: Watch, slime: "Slime", signals: DeferredSignals) -> int:
    """Wait until slime ends, and return its exit status."""
    while True:
        status = slime.status()
        watch.look()
        if status is not None:
            return status
        if signals.received:
            watch.request_stop(signals.received)
        time.sleep(_POLL_S)


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
        # The driver ends Ray's own processes too.
        end_session(self._process, patience=15.0, first=signal.SIGINT)
        end(self._started, patience=10.0)
