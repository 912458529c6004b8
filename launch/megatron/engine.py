"""Driver of the embedded engine: runs every step of the schedule on all ranks, and saves checkpoints."""

import collections
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.files import write_text
from launch.megatron.ranks import Ranks
from launch.run import metrics, progress, run_state
from launch.run.deferred_signals import DeferredSignals
from launch.run.retries import retrying
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from recipes.compose import commands
from recipes.errors import DivergedError, TrainError
from recipes.plan.saves import save_interval, saves_optimizer


def train_embedded(plan: Plan, run: RunFolder, console: Console) -> bool:
    """Train from the last complete checkpoint (or the base) to the last step. Return whether the last step is reached.

    After a rank dies or hangs, training restarts from the last checkpoint. It restarts at most `engine.max_retries` times, and not
    if the same step failed in the same way twice. SIGTERM (a scheduler takes its machines back) and SIGHUP (the terminal closes) let
    the current step end and save; the next start of the same command continues from there.

    Raise `TrainError` if training cannot continue. The checkpoints are not removed.
    """
    return retrying(lambda: _attempt(plan, run, console), plan.recipe, run.root, console)


def _attempt(plan: Plan, run: RunFolder, console: Console) -> bool:
    total = plan.schedule.num_steps
    completed, checkpoint, note = run.open()
    if note:
        console.print(note)
    if completed == total:
        return True
    run_state.refuse_weights_alone(checkpoint, plan.recipe)
    plan.write(run.root / "plan.json")
    with started(plan, checkpoint, console) as ranks:
        log = metrics.Metrics(run.root, completed)
        with contextlib.closing(log), progress.training(console, total, completed) as advance:
            done, signalled = _steps(plan, run, ranks, log, completed, advance)
    if done < total:
        console.print(f"{signalled}: saved after step {done} of {total}; run the same command to continue")
    return done == total


@contextlib.contextmanager
def started(plan: Plan, checkpoint: Path | None, console: Console) -> Iterator[Ranks]:
    """Start all ranks with the base's weights, or with a checkpoint's state."""
    with Ranks(plan.recipe) as ranks:
        with console.status(f"Starting {plan.world_size} ranks"):
            ranks.build(plan)
            if checkpoint is not None:
                ranks.call("load", str(checkpoint))
        yield ranks


def _steps(
    plan: Plan, run: RunFolder, ranks: Ranks, log: metrics.Metrics, completed: int, advance: Any
) -> tuple[int, str | None]:
    """Run the remaining steps, or stop after the current one on SIGTERM or SIGHUP.

    Return the number of completed steps, the last of which is saved, and the name of the signal if there was one.
    """
    recipe, total = plan.recipe, plan.schedule.num_steps
    interval = save_interval(recipe, total)
    recent = collections.deque(metrics.losses(run.root), maxlen=10)

    def evaluate(step: int) -> None:
        if plan.heldout is None:
            return
        log.add({"step": step, "heldout_loss": ranks.call("heldout_loss")[0]})

    if completed == 0:
        evaluate(0)
    with DeferredSignals() as signals:
        for step in range(completed, total):
            limit = recipe.engine.spike * max(recent) if recipe.engine.spike and recent else math.inf
            try:
                line = ranks.call("train_step", step, limit)[0]
            except DivergedError as error:
                raise _diverged(plan, run, ranks, step, error) from None
            except TrainError as error:
                if signals.received:  # it ended the ranks too, as Slurm's `scancel` does
                    resume = "run the same command to go on from the last checkpoint"
                    raise KeyboardInterrupt(
                        f"{signals.received} ended the ranks in step {step + 1}; {resume}"
                    ) from error
                raise
            log.add(line)
            recent.append(line["loss"])
            done = step + 1
            if done % recipe.optim.eval_steps == 0 or done == total:
                evaluate(done)
            if done % interval == 0 or done == total or signals.received:
                _save(run, ranks, done, optimizer=saves_optimizer(recipe, done, total))
            advance(line)
            if signals.received:
                return done, signals.received
    return total, None


def _save(run: RunFolder, ranks: Ranks, done: int, *, optimizer: bool) -> None:
    with run.new_checkpoint(done) as folder:
        ranks.call("save", str(folder), done, optimizer)


def _diverged(plan: Plan, run: RunFolder, ranks: Ranks, step: int, error: DivergedError) -> DivergedError:
    """Save the state before the step and a record of the step, for `make replay`. Return the error to raise."""
    if step and not run.checkpoint(step):
        _save(run, ranks, step, optimizer=True)
    of_step = plan.schedule.step(step).sequences
    sequences = [{"id": plan.data.ids[s], "segment": plan.data.segments[s]} for s in of_step]
    record = {"step": step + 1, "problem": error.problem, "fix": error.fix, "sequences": sequences}
    write_text(run.root / "diverged.json", json.dumps(record, indent=2) + "\n")
    names = ", ".join(dict.fromkeys(plan.data.ids[s] for s in of_step))
    return DivergedError(
        f"step {step + 1}: {error.problem}. No weight was updated, and the state before the step is saved. Trajectories of the step: "
        f"{names}",
        f"inspect each sequence with `{commands.of_run('replay', plan.recipe, f'STEP={step + 1}')}`, or {error.fix}",
    )
