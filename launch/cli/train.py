"""`make train` from the recipe to the report, with either engine, and `make rehearse`."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from rich.console import Console

from launch import checks
from launch.preflight import checklist, checkpoint_checks, recipe_checks
from launch.preflight.machine import machine
from launch.run import prepare, run_state, same_run, which_run
from launch.run import run_plan as plans
from launch.run.run_folder import RunFolder, check_room, held
from launch.run.run_plan import Plan
from launch.run.run_state import Reached
from launch.sanity.subject import Subject, of_run
from launch.weights.hf_folder import check_kept
from recipes.config import EngineName, Recipe
from recipes.context import check_context
from recipes.errors import ConfigError, LimiError
from recipes.paths import run_folder
from recipes.plan.saves import saves

_ONCE = "leave out anew=true from now on: it would move this run aside and train again from the first step"


def train(recipe: Recipe, console: Console) -> None:
    """Continue the run in its folder: train to the last step, export, check, and write the report.

    Completed parts are not repeated, and a finished run is left unchanged. With `anew` the folder moves aside and everything runs.
    Raise `ConfigError` if the folder holds a run of another recipe.
    """
    from launch.serving.server import free_port

    started = time.perf_counter()
    there = run_state.State(Reached.nothing) if recipe.anew else run_state.of(recipe)
    if there.completed:
        same_run.refuse_another(recipe)
    if there.reached is Reached.passed:
        console.print(run_state.finished(recipe, there))
        return
    if recipe.sanity.url is None:
        free_port(recipe.sanity.port)
    if there.reached is Reached.failed:  # perhaps for what became of the export's files
        with console.status("Reading the export"):
            there = run_state.of(recipe, read=True)
    if there.reached < Reached.trained:
        plan = _plan(recipe, console)
        run = RunFolder(plan.recipe, plan.data, plan.heldout)
    else:
        console.print(f"{recipe.run} {there.next}")
        prepare.base(recipe, console)
        plan = replace(plans.of_run(run_folder(recipe)), recipe=recipe)
        run = RunFolder(plan.recipe, plan.data, plan.heldout)
        run.take()
    if recipe.anew and (aside := run.set_aside()):
        console.print(f"the run of this name is now '{aside}'")
    with _once(recipe):
        if there.reached < Reached.trained and not trained(plan, run, console):
            if recipe.anew:
                console.print(_ONCE)
            return
        if there.reached < Reached.exported:
            export_run(plan.recipe, run, console)
        from launch.cli import placed  # not at the top: a finished run is reported without importing Ray

        if placed.elsewhere(plan.recipe):
            limits = [word for word in recipe.overrides if word.startswith("sanity.")]
            words = [f"checkpoint={run.hf}", f"cluster.root={recipe.cluster.root}", *limits]
            placed.run_placed("sanity", plan.recipe, run.hf, words, console)
        else:
            check_export(of_run(plan, run.hf), console, started)


def _plan(recipe: Recipe, console: Console) -> Plan:
    """Return the plan to train. Raise an error for everything that would end training early."""
    slime = recipe.engine.name is EngineName.slime
    plan = _through_slime_plan(recipe, console) if slime else _embedded_plan(recipe, console)
    console.print(
        f"{recipe.run}: {plan.schedule.num_steps} steps on {plan.world_size} ranks, {len(plan.data.ids)} sequences of "
        f"{min(plan.data.lengths):,} to {max(plan.data.lengths):,} tokens"
    )
    return replace(plan, recipe=replace(plan.recipe, anew=False))  # which is the command's, not the run's


def _embedded_plan(recipe: Recipe, console: Console) -> Plan:
    checklist.refuse([recipe_checks.paths(recipe), machine(recipe)])
    prepare.base(recipe, console)
    rows = checkpoint_checks.checkpoint_rows(recipe)
    checklist.refuse(rows)
    check_kept(Path(recipe.model.checkpoint))
    plan = prepare.prepare_plan(recipe, console)
    check_context(recipe.model, max(plan.data.lengths))
    checks.warn([*rows, *recipe_checks.oddities(plan.planned)], console)
    check_room(plan.recipe, saves(plan.recipe, plan.schedule.num_steps).most - held(plan.recipe))
    return plan


def _through_slime_plan(recipe: Recipe, console: Console) -> Plan:
    """Run every check of `make check`, on a CPU without the network's; then return the plan."""
    from launch.preflight import cluster_checks as on_cluster
    from launch.slime.arguments import on_cpu

    recipe = same_run.with_layout_of_run(recipe)
    able = machine(recipe)
    checklist.refuse([able])
    prepare.base(recipe, console)
    packed = cache(lambda: prepare.packed(recipe, console))
    rows = recipe_checks.recipe_rows(recipe, packed, able)
    checklist.refuse(rows)  # before Ray starts, and half a minute goes by
    checklist.refuse(on_cluster.connected_rows(recipe, console, 0.0 if on_cpu(recipe) else on_cluster.NETWORK_S))
    checks.warn(rows, console)
    return prepare.settled(recipe, packed())


@contextlib.contextmanager
def _once(recipe: Recipe) -> Iterator[None]:
    """If the run began with `anew`, make every error say to leave that override out of the next command."""
    try:
        yield
    except LimiError as error:
        if recipe.anew:
            error.fix = f"{error.fix}; {_ONCE}" if error.fix else _ONCE
        raise
    except KeyboardInterrupt as interrupt:
        if recipe.anew:
            raise KeyboardInterrupt(f"Interrupted; the same command goes on from what is whole; {_ONCE}") from interrupt
        raise


def trained(plan: Plan, run: RunFolder, console: Console) -> bool:
    """Train. Return whether the last step is done and its checkpoint complete."""
    if plan.recipe.engine.name is EngineName.megatron:
        from launch.megatron.engine import train_embedded

        return train_embedded(plan, run, console)
    from launch.slime.engine import train_through_slime

    return train_through_slime(plan, run, console) is not None


def export_run(recipe: Recipe, run: RunFolder, console: Console) -> None:
    """Write `hf/` from the last step's checkpoint."""
    from launch.export.export import export_checkpoint

    _, last = which_run.pick(run.root, which_run.steps(run.root))
    export_checkpoint(recipe, last, run.hf, console)


def check_export(one: Subject, console: Console, started: float) -> None:
    """Check an export, print the results, and write the report. started: `time.perf_counter` at the start of the command.

    Raise `SanityError` if a check failed.
    """
    # Not at the top: a finished run is reported without importing transformers.
    from launch.cli import report
    from launch.sanity import sanity_check, sanity_page

    done = sanity_check.run_checks(one, console)
    console.print(checks.table("Sanity check", done, console.width))
    if one.folder == one.export.parent:  # the last export of its run
        written = report.write_report(one.recipe, one.folder)
        run_state.mark_checked(one.folder)
    else:
        written = sanity_page.write_sanity_page(one)
    console.print(f"report: {written}   checkpoint: {one.export}   {time.perf_counter() - started:.0f} s")
    sanity_check.refuse_failed(done, one)


def rehearse(recipe: Recipe, console: Console) -> None:
    """Rehearse a run through slime on the longest sequence. Raise `ConfigError` for the embedded engine."""
    if recipe.engine.name is not EngineName.slime:
        raise ConfigError(
            f"only runs through slime are rehearsed, and cluster={recipe.cluster.name} trains with the embedded engine",
            "write engine=slime, or a model that trains through it: MODEL=qwen3-32b",
        )
    from launch.slime import rehearsal

    plan = _through_slime_plan(recipe, console)
    done = rehearsal.rehearse(plan, console)
    console.print(rehearsal.table(done, plan))
    console.print(rehearsal.remark(done, plan))
