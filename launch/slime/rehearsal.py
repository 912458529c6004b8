"""`make rehearse`: one step with the longest sequence, a save, a reload and one more step, on the real cluster. It reveals failures
that would otherwise appear hours into the run."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.files import write_text
from launch.run import metrics
from launch.run.run_folder import RunFolder, sizes
from launch.run.run_plan import Plan
from launch.run.which_run import TRACKER
from launch.slime import checkpoints, engine, job
from launch.slime.arguments import on_cpu
from launch.slime.watch import LOG
from recipes.config import Recipe, Save
from recipes.errors import ConfigError, TrainError
from recipes.paths import run_folder
from recipes.plan.memory import Load, gpu_memory, memory_limit

NAME = "rehearsal.json"
BAND = 1.05  # the measured peak may be this multiple of the planned one


@dataclass(frozen=True)
class Rehearsed:
    """Measurements and the plan's figures, in bytes and seconds unless a comment says otherwise."""

    longest: int  # tokens of the longest sequence
    fullest: int  # tokens of the largest micro-batch, including padding
    micro_batches: int  # per rank and step
    planned_peak: float
    peak: float
    limit: float
    step_s: float
    after_reload_s: float
    save_s: float
    checkpoint: int


def rehearse(plan: Plan, console: Console) -> Rehearsed:
    """Rehearse in the folder `runs/NAME-rehearsal`. Its checkpoint is removed at the end.

    Raise `TrainError` if it fails. If memory ran out, the message names overrides that save memory.
    """
    root = run_folder(plan.recipe).with_name(f"{plan.recipe.run}-rehearsal")
    recipe = replace(
        plan.recipe, run=root.name, engine=replace(plan.recipe.engine, save_steps=1, save=Save.full, max_retries=0)
    )
    plan = Plan(recipe, plan.data, None, rehearsal=True)
    run = RunFolder(recipe, plan.data, None)
    run.take()
    _refuse_a_run(root)
    shutil.rmtree(root, ignore_errors=True)
    run.open()
    plan.write(root / "plan.json")
    try:
        return _rehearsed(plan, run, console)
    except TrainError as error:
        if "OutOfMemory" in str(error) or "out of memory" in str(error):
            raise TrainError(
                f"{error}\nIt does not fit: write layout.recompute=full, layout.cp={2 * recipe.layout.cp}, or "
                "layout.optimizer_state=offloaded, and rerun `make plan`"
            ) from error
        raise
    finally:
        shutil.rmtree(root / "checkpoints", ignore_errors=True)


def _refuse_a_run(root: Path) -> None:
    """Raise `ConfigError` if the folder that would be removed belongs to a run, not to a rehearsal."""
    path = root / "plan.json"
    if path.is_file() and not json.loads(path.read_text(encoding="utf-8"))["rehearsal"]:
        raise ConfigError(
            f"'{root}' holds a run, but a rehearsal of run={root.name.removesuffix('-rehearsal')} needs that folder",
            "write run=OTHER for the rehearsal",
        )


def _rehearsed(plan: Plan, run: RunFolder, console: Console) -> Rehearsed:
    recipe = plan.recipe
    job.write_job(recipe, 1, recipe.model.checkpoint)
    _start(recipe, run, 0, console)
    checkpoints.settle(run)
    saved = run.checkpoint(1)
    if saved is None:
        raise TrainError("no checkpoint was written", f"see {run.root / LOG}")
    # The step's metrics are written before the save; Megatron writes the checkpoint's number after it.
    save_s = (saved.parent / TRACKER).stat().st_mtime - (run.root / metrics.NAME).stat().st_mtime
    job.write_job(recipe, 2, checkpoints.go_on_from(run, saved), save=False)
    _start(recipe, run, 1, console)
    first, second = (m for m in metrics.read_metrics(run.root / metrics.NAME) if "loss" in m)
    step = plan.schedule.step(0)
    tokens = [[plan.schedule.padded([plan.data.lengths[s] for s in batch]) for batch in rank] for rank in step.ranks]
    done = Rehearsed(
        longest=max(plan.data.lengths),
        fullest=max(max(rank) for rank in tokens),
        micro_batches=len(step.ranks[0]),
        planned_peak=max(stage.total for stage in gpu_memory(recipe, Load(tokens))),
        peak=1e9 * max(first["time"]["peak_gb"], second["time"]["peak_gb"]),
        limit=memory_limit(recipe),
        step_s=first["time"]["step_s"],
        after_reload_s=second["time"]["step_s"],
        save_s=save_s,
        checkpoint=sum(sizes(saved).values()),
    )
    write_text(run.root / NAME, json.dumps(vars(done), indent=2) + "\n")
    return done


def _start(recipe: Recipe, run: RunFolder, completed: int, console: Console) -> None:
    """Run one step through slime. Raise `KeyboardInterrupt` if a signal ended it."""
    if engine.start(recipe, run, completed, completed + 1, console):
        raise KeyboardInterrupt("The rehearsal was interrupted.")


def table(done: Rehearsed, plan: Plan) -> Table:
    """Build the table of measured and planned figures."""
    out = Table(box=box.SIMPLE_HEAD)
    for column in ("rehearsal", "measured", "planned", "limit"):
        out.add_column(column)
    gb = 1e9
    share = done.peak / done.planned_peak
    judged = "not judged on a CPU" if on_cpu(plan.recipe) else f"{done.limit / gb:,.1f} GB"
    out.add_row("longest sequence", f"{done.longest:,} tokens", "", "")
    out.add_row("micro-batches of a rank", f"{done.micro_batches}, up to {done.fullest:,} tokens", "", "")
    out.add_row("peak memory", f"{done.peak / gb:,.2f} GB ({share:.0%})", f"{done.planned_peak / gb:,.2f} GB", judged)
    out.add_row("step, the first of a start", f"{done.step_s:,.1f} s", "", "")
    out.add_row("step after the reload", f"{done.after_reload_s:,.1f} s", "", "")
    speed = done.checkpoint / gb / max(done.save_s, 0.1)
    out.add_row("save", f"{done.checkpoint / gb:,.2f} GB in {done.save_s:,.1f} s", "", f"{speed:,.2f} GB/s")
    return out


def remark(done: Rehearsed, plan: Plan) -> str:
    """Return one sentence that compares the peak memory with the plan's."""
    if on_cpu(plan.recipe):
        return "Saving, loading and continuing worked. The memory shown is that of a process on a CPU."
    if done.peak > BAND * done.planned_peak:
        return (
            f"Saving, loading and continuing worked, but the peak is {done.peak / done.planned_peak:.0%} of the planned one. No step "
            f"of the run needs more than this one; {done.limit / 1e9 - done.peak / 1e9:,.1f} GB are left."
        )
    return "Saving, loading and continuing worked, within the planned memory."
