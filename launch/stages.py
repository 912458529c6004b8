"""The stages of a run, in the order it takes them, each a function of the recipe."""

import difflib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from recipes.compose import run_folder, to_yaml
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.layout import data_parallel, world_size

if TYPE_CHECKING:
    from launch.plan import Plan

Stage = Callable[[Recipe, Console], None]


def data(recipe: Recipe, console: Console) -> None:
    """Packs the training and the held-out trajectories, every mask proved."""
    plan = _plan(recipe, console)
    for name, packed in (("training", plan.data), ("held out", plan.heldout)):
        counts = packed.manifest["counts"]
        console.print(
            f"{name}: {counts['records']} trajectories, {counts['tokens']:,} tokens, {counts['supervised']:,} supervised, "
            f"in {packed.folder}"
        )


def train(recipe: Recipe, console: Console) -> None:
    """Data, training, export, sanity check, report."""
    from launch.sanity.server import free_port

    started = time.perf_counter()
    free_port(recipe.sanity.port)
    from launch.megatron import engine
    from launch.run_folder import RunFolder, check_room

    plan = _plan(recipe, console)
    # Weights, two moments and fp32 copies for every checkpoint kept, and one being written.
    weights = sum(f.stat().st_size for f in Path(recipe.model.checkpoint).glob("*.safetensors"))
    check_room(recipe, 4 * weights * (recipe.engine.keep_last + 1))
    console.print(
        f"{recipe.run}: {plan.schedule.num_steps} steps on {plan.world_size} ranks, {len(plan.data.ids)} sequences of "
        f"{min(plan.data.lengths):,} to {max(plan.data.lengths):,} tokens"
    )
    run = RunFolder(recipe, plan.data, plan.heldout)
    engine.train(plan, run, console)
    from launch import report
    from launch.sanity import check

    done = check.check(plan, run, console)
    console.print(check.table(done))
    console.print(f"report: {report.write(run)}   checkpoint: {run.hf}   {time.perf_counter() - started:.0f} s")
    check.refuse_failed(done, run)


def _plan(recipe: Recipe, console: Console) -> "Plan":
    from data_prep.dataset import prepare
    from launch.plan import Plan

    if recipe.model.random_init:
        from launch.model import tiny

        if tiny.make(recipe):
            console.print(f"made {recipe.model.checkpoint} with random weights")
    return Plan(recipe, prepare(recipe, Path(recipe.data.path)), prepare(recipe, Path(recipe.data.heldout)))


STAGES: dict[str, Stage] = {"train": train, "data": data}


def find(named: list[str]) -> Stage:
    """The stage that the command line names, or `train`."""
    if len(named) > 1 or (named and named[0] not in STAGES):
        word = next((w for w in named if w not in STAGES), named[-1])
        near = difflib.get_close_matches(word, STAGES, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"'{word}' is no stage and not name=value; stages are {', '.join(STAGES)}, the nearest is {near}"
        )
    return STAGES[named[0]] if named else train


def show(stage: Stage, recipe: Recipe, console: Console) -> None:
    """`dry_run=true`: the resolved recipe and what would run; writes nothing."""
    console.print(to_yaml(recipe))
    console.print(f"would run: {stage.__name__} ({stage.__doc__})")
    console.print(f"  data     {recipe.data.path} and {recipe.data.heldout}, packed into {recipe.data.out}")
    if stage is train:
        m = recipe.model
        made = " (made with random weights if missing)" if m.random_init else ""
        console.print(f"  model    {m.name} from {m.checkpoint}{made}")
        console.print(
            f"  train    engine {recipe.engine.name.value}, {world_size(recipe)} ranks, data parallel {data_parallel(recipe)}, "
            f"{recipe.optim.epochs} epochs of steps of {recipe.optim.batch_size} trajectories"
        )
        console.print(f"  write    {run_folder(recipe)}")
