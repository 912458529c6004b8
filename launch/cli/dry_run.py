"""`dry_run=true`: print the whole recipe, the origin of each value, and what would run."""

import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from launch.cli.stages import Stage
from recipes.compose.origins import annotated, origins
from recipes.compose.recipe import to_yaml
from recipes.config import EngineName, Recipe
from recipes.errors import LimiError
from recipes.layout import data_parallel, world_size
from recipes.paths import run_folder


def show_dry_run(stage: Stage, recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe and what the stage would do. Only the `job.json` of a slime run is written."""
    if stage.name == "serve":
        _show_server(recipe, console)
        return
    if stage.name == "bench-gpu":
        from launch.bench.gpu import run

        run.show_bench_gpu(recipe, console)
        return
    console.print(annotated(to_yaml(recipe), origins(recipe.overrides, stage.name)))
    console.print(f"would run: {stage.name} ({stage.does})")
    console.print(
        f"  data     {recipe.data.path} and {recipe.data.heldout or 'nothing held out'}, packed into {recipe.data.out}"
    )
    trains = stage.name == "train"
    if trains:
        console.print(f"  run      {recipe.run} {_foreseen(recipe)}")
    if trains and recipe.engine.name is EngineName.slime:
        _show_job(recipe, console)
    elif trains:
        m = recipe.model
        layout = "layout searched for" if recipe.layout.search else f"data parallel {data_parallel(recipe)}"
        made = " (made with random weights if missing)" if m.random_init else ""
        console.print(f"  model    {m.name} from {m.checkpoint}{made}")
        console.print(
            f"  train    engine {recipe.engine.name.value}, {world_size(recipe)} ranks, {layout}, "
            f"{recipe.optim.epochs} epochs of steps of {recipe.optim.batch_size} trajectories"
        )
        console.print(f"  write    {run_folder(recipe)}")


def _foreseen(recipe: Recipe) -> str:
    """Return what `make train` would do, given what is in the run's folder."""
    from launch.run import run_state, same_run

    root = run_folder(recipe)
    if recipe.cluster.address and not Path(recipe.cluster.root).is_dir():
        return f"goes on from what is in '{root}' of the cluster, which this machine does not see"
    if recipe.anew:
        return "trains from the first step" + (f", and '{root}' moves aside" if root.is_dir() else "")
    try:
        there = run_state.of(recipe)
        if there.completed:
            same_run.refuse_another(recipe)
    except LimiError as error:
        return f"is refused: {error}"
    return there.next


def _show_server(recipe: Recipe, console: Console) -> None:
    """Print SGLang's command line, ready to be typed on the node that serves."""
    from launch.run import which_run
    from launch.serving import sglang_command
    from launch.serving.serve import PORT, thinks

    own, folder = which_run.exported(recipe)
    console.print(to_yaml(own))
    env = {k: v for k, v in sglang_command.environment(own, folder).items() if os.environ.get(k) != v}
    words = sglang_command.command(own, folder, own.sanity.port or PORT, thinks(folder))
    console.print("would run: " + shlex.join(["env", *(f"{k}={v}" for k, v in env.items()), *words]))


def _show_job(recipe: Recipe, console: Console) -> None:
    """Print what would be submitted to the cluster, with the layout that the planner chooses. Write `job.json`, unless the run has
    begun."""
    from launch.run import prepare
    from launch.slime import job
    from recipes.plan import planner

    made = planner.make_plan(recipe, prepare.sequences(recipe, console))
    steps, base = made.schedule.num_steps, made.recipe.model.checkpoint
    submitted = job.job(made.recipe, steps, base, save=True)
    console.print("  submit   python3 " + submitted["entrypoint"])
    for flag, values in _grouped(submitted["argv"]):
        console.print(f"             {flag} {' '.join(values)}".rstrip())
    for name, value in submitted["env_vars"].items():
        console.print(f"  env      {name}={value}")
    if (begun := run_folder(recipe) / "plan.json").exists():
        console.print(f"  job      not written: '{begun.parent}' has begun and keeps its own")
    else:
        console.print(f"  job      {job.write_job(made.recipe, steps, base)}")


def _grouped(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every flag with its values."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        yield words[start], words[start + 1 : end]
