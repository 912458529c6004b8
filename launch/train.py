"""Training from the recipe to the report, by either engine, and its rehearsal."""

import time
from functools import cache

from rich.console import Console

from launch import checklist, preflight, preflight_checkpoint, prepare, report
from launch.machine import machine
from launch.plan import Plan
from launch.run_folder import RunFolder, check_room, held
from recipes.config import EngineName, Recipe
from recipes.context import check_context
from recipes.errors import ConfigError
from recipes.memory import disk


def train(recipe: Recipe, console: Console) -> None:
    """Checks, trains, exports, checks and serves what came out and writes the report."""
    from launch.sanity import check, subject
    from launch.sanity.server.server import free_port

    started = time.perf_counter()
    slime = recipe.engine.name is EngineName.slime
    if recipe.sanity.url is None:
        free_port(recipe.sanity.port)
    plan = _through_slime_plan(recipe, console) if slime else _embedded_plan(recipe, console)
    run = RunFolder(plan.recipe, plan.data, plan.heldout)
    console.print(
        f"{run.recipe.run}: {plan.schedule.num_steps} steps on {plan.world_size} ranks, {len(plan.data.ids)} sequences of "
        f"{min(plan.data.lengths):,} to {max(plan.data.lengths):,} tokens"
    )
    if not (_through_slime if slime else _embedded)(plan, run, console):
        return
    of_run = subject.of_run(plan, run.hf)
    done = check.check(of_run, console)
    console.print(check.table(done))
    console.print(
        f"report: {report.write(plan.recipe, run.root)}   checkpoint: {run.hf}   {time.perf_counter() - started:.0f} s"
    )
    check.refuse_failed(done, of_run)


def _embedded_plan(recipe: Recipe, console: Console) -> Plan:
    checklist.refuse([preflight.paths(recipe), machine(recipe)])
    prepare.base(recipe, console)
    rows = preflight_checkpoint.rows(recipe)
    checklist.refuse(rows)
    plan = prepare.plan(recipe, console)
    check_context(recipe.model, max(plan.data.lengths))
    checklist.warn([*rows, *preflight.oddities(plan.planned)], console)
    return plan


def _embedded(plan: Plan, run: RunFolder, console: Console) -> bool:
    """Whether it trained to the end, with the export in `hf/`."""
    from launch.megatron import engine

    one = disk(plan.recipe)  # every checkpoint kept, one being written, and the export
    check_room(plan.recipe, one.checkpoint * (plan.recipe.engine.keep_last + 1) + one.export - held(plan.recipe))
    return engine.train(plan, run, console)


def _through_slime_plan(recipe: Recipe, console: Console) -> Plan:
    """Every check of `make check` first; on a CPU without the network's, which is not judged there."""
    from launch.slime import preflight as on_cluster
    from launch.slime.arguments import on_cpu

    able = machine(recipe)
    checklist.refuse([able])
    prepare.base(recipe, console)
    packed = cache(lambda: prepare.packed(recipe, console))
    rows = preflight.rows(recipe, packed, able)
    checklist.refuse(rows)  # before Ray starts, and half a minute goes by
    checklist.refuse(on_cluster.connected_rows(recipe, console, 0.0 if on_cpu(recipe) else on_cluster.NETWORK_S))
    checklist.warn(rows, console)
    return prepare.settled(recipe, packed())


def _through_slime(plan: Plan, run: RunFolder, console: Console) -> bool:
    """As `_embedded`."""
    from launch.export import export
    from launch.slime import engine

    export(plan.recipe, engine.train(plan, run, console), run.hf, console)
    return True


def rehearse(recipe: Recipe, console: Console) -> None:
    """What a run through slime does first and last, on the longest sequence."""
    if recipe.engine.name is not EngineName.slime:
        raise ConfigError(
            f"cluster={recipe.cluster.name} trains with the embedded engine, which needs no rehearsal",
            "write MODEL=qwen3-32b, or engine=slime",
        )
    from launch.slime import rehearsal

    plan = _through_slime_plan(recipe, console)
    done = rehearsal.rehearse(plan, console)
    console.print(rehearsal.table(done, plan))
    console.print(rehearsal.remark(done, plan))
