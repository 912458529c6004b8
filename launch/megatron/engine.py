"""The embedded engine's driver: every step of the schedule on all ranks, and checkpoints."""

import collections
import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from data_prep.files import write_text
from launch import metrics, progress
from launch.megatron.ranks import Ranks
from launch.plan import Plan
from launch.retries import retrying
from launch.run_folder import RunFolder
from recipes.compose import make_command
from recipes.errors import DivergedError


def train(plan: Plan, run: RunFolder, console: Console) -> bool:
    """Trains from the last whole checkpoint (or the base) to the last step; whether it came so far.

    After a rank died or hung it starts again from the last checkpoint, `engine.max_retries` times at most, and not where the
    same step failed in the same way twice. SIGTERM, by which a scheduler takes its machines back, lets the step end, saves,
    and leaves the rest to the next start.

    Raises `TrainError` where it cannot go on; the checkpoints stay.
    """
    return retrying(lambda: _attempt(plan, run, console), plan.recipe, run.root, console)


def _attempt(plan: Plan, run: RunFolder, console: Console) -> bool:
    total = plan.schedule.num_steps
    completed, checkpoint, note = run.open()
    if note:
        console.print(note)
    if completed == total:
        return True
    plan.write(run.root / "plan.json")
    with started(plan, checkpoint, console) as ranks:
        log = metrics.Metrics(run.root, completed)
        with contextlib.closing(log), progress.training(console, total, completed) as advance:
            done = _steps(plan, run, ranks, log, completed, advance)
    if done < total:
        console.print(f"SIGTERM: saved after step {done} of {total}; the same command goes on")
    return done == total


@contextlib.contextmanager
def started(plan: Plan, checkpoint: Path | None, console: Console) -> Iterator[Ranks]:
    """All ranks with the base's weights, or a checkpoint's state."""
    with Ranks(plan.recipe) as ranks:
        with console.status(f"Starting {plan.world_size} ranks"):
            ranks.build(plan)
            if checkpoint is not None:
                ranks.call("load", str(checkpoint))
        yield ranks


class _Sigterm:
    """A context in which SIGTERM is noted and ends nothing."""

    def __enter__(self) -> "_Sigterm":
        self.came = False
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _steps(plan: Plan, run: RunFolder, ranks: Ranks, log: metrics.Metrics, completed: int, advance: Any) -> int:
    """Runs the steps that are left, or up to SIGTERM; returns the number of those completed, the last of them saved."""
    recipe, total = plan.recipe, plan.schedule.num_steps
    recent = collections.deque(metrics.losses(run.root), maxlen=10)

    def evaluate(step: int) -> None:
        if plan.heldout is None:
            return
        log.add({"step": step, "heldout_loss": ranks.call("heldout_loss")[0]})

    if completed == 0:
        evaluate(0)
    with _Sigterm() as sigterm:
        for step in range(completed, total):
            limit = recipe.engine.spike * max(recent) if recipe.engine.spike and recent else math.inf
            try:
                line = ranks.call("train_step", step, limit)[0]
            except DivergedError as error:
                raise _diverged(plan, run, ranks, step, error) from None
            log.add(line)
            recent.append(line["loss"])
            done = step + 1
            if done % recipe.optim.eval_steps == 0 or done == total:
                evaluate(done)
            if done % recipe.engine.save_steps == 0 or done == total or sigterm.came:
                _save(run, ranks, done)
            advance(line)
            if sigterm.came:
                return done
    return total


def _save(run: RunFolder, ranks: Ranks, done: int) -> None:
    with run.new_checkpoint(done) as folder:
        ranks.call("save", str(folder), done)


def _diverged(plan: Plan, run: RunFolder, ranks: Ranks, step: int, error: DivergedError) -> DivergedError:
    """Saves the state before the step and what the step was, for `make replay`; returns what to raise."""
    if step and not run.checkpoint(step):
        _save(run, ranks, step)
    of_step = plan.schedule.step(step).sequences
    sequences = [{"id": plan.data.ids[s], "segment": plan.data.segments[s]} for s in of_step]
    record = {"step": step + 1, "problem": error.problem, "fix": error.fix, "sequences": sequences}
    write_text(run.root / "diverged.json", json.dumps(record, indent=2) + "\n")
    names = ", ".join(dict.fromkeys(plan.data.ids[s] for s in of_step))
    return DivergedError(
        f"step {step + 1}: {error.problem}. Nothing was updated, and the state before the step is saved. It trained on {names}",
        f"see it sequence by sequence with {make_command('replay', plan.recipe, f'STEP={step + 1}')}, or {error.fix}",
    )
