"""Stages after training: replay a step, export, and check the export."""

import time
from dataclasses import replace

from rich.console import Console

from recipes.config import EngineName, Recipe
from recipes.errors import ConfigError
from recipes.paths import run_folder


def replay(recipe: Recipe, console: Console) -> None:
    """Repeat step `step` of a run, as a whole and sequence by sequence, with the recipe from the run's folder."""
    from launch.megatron.replay import replay_step
    from launch.preflight import checklist, machine
    from launch.run import prepare, which_run
    from launch.run.run_folder import RunFolder
    from launch.run.run_plan import of_run

    own = which_run.own_recipe(recipe)
    if own.engine.name is not EngineName.megatron:
        raise ConfigError(
            f"run={own.run} was trained through slime, and a replay is the embedded engine's",
            "write run=NAME of a run that it trained",
        )
    checklist.refuse([machine.machine(own)])
    prepare.base(own, console)
    plan = replace(of_run(run_folder(own)), recipe=own)
    if recipe.step is None or recipe.step > plan.schedule.num_steps:
        raise ConfigError(
            f"step={recipe.step}: the run has steps 1 to {plan.schedule.num_steps}", "write step=N (make: STEP=N)"
        )
    replay_step(plan, RunFolder(own, plan.data, plan.heldout), recipe.step, console)


def export(recipe: Recipe, console: Console) -> None:
    """Write the Hugging Face folder of a run's newest checkpoint, or of the one after `step` steps."""
    from launch.export.export import export_checkpoint
    from launch.run import which_run

    run = run_folder(recipe)
    own = which_run.own_recipe(recipe)
    step, checkpoint = which_run.pick(run, recipe.step)
    export_checkpoint(own, checkpoint, which_run.target(run, step), console)


def sanity(recipe: Recipe, console: Console) -> None:
    """Check the export in `checkpoint`, or that of the run: its files, then what SGLang answers with it."""
    from launch.cli import placed, train
    from launch.run import which_run
    from launch.sanity import sanity_check, subject

    started = time.perf_counter()
    own, folder = which_run.exported(recipe)
    if placed.elsewhere(own):
        return placed.run_placed("sanity", own, folder, placed.own_words(recipe), console)
    sanity_check.say_unserved(own, folder, console)
    train.check_export(subject.of_export(own, folder, console), console, started)


def serve(recipe: Recipe, console: Console) -> None:
    """Serve an export until it is interrupted: on this machine, or inside a job where the GPUs are."""
    from launch.cli import placed
    from launch.run import which_run
    from launch.serving import serve

    own, folder = which_run.exported(recipe)
    if placed.elsewhere(own):
        console.print(
            "it listens on that node's loopback: reach it with ssh -L 30000:127.0.0.1:30000 NODE, the node named below"
        )
        return placed.run_placed("serve", own, folder, placed.own_words(recipe), console)
    serve.serve(recipe, console)
