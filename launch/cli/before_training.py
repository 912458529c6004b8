"""Stages before training: pack, inspect, plan, check, and print scripts for schedulers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from recipes.config import EngineName, Recipe
from recipes.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.pack.dataset import Dataset


def data(recipe: Recipe, console: Console) -> None:
    """Pack the training and held-out trajectories, prove every mask, and print the counts."""
    from launch.run import prepare

    packed = prepare.packed(recipe, console)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "records", "rejected", "sequences", "tokens", "supervised", "longest"):
        table.add_column(column, justify="right" if column else "left")
    for name, one in packed.items():
        counts = one.manifest["counts"]
        figures = [f"{counts[key]:,}" for key in ("records", "rejected", "sequences", "tokens", "supervised")]
        table.add_row(name, *figures, f"{max(one.lengths):,}")
    console.print(table)
    for name, one in packed.items():
        console.print(f"{name}: {one.folder}")


def inspect(recipe: Recipe, console: Console) -> None:
    """Show the sequences of trajectory `id` with supervised tokens coloured; without `id`, list all trajectories, or with `html`
    write a page of each set."""
    from data_prep.pack import show
    from launch.run import prepare

    if recipe.html and recipe.id is not None:
        raise ConfigError(
            f"html=true writes a page of the whole set, and id={recipe.id} names one trajectory",
            "leave out one of them",
        )
    all_packed = prepare.packed(recipe, console)
    if recipe.html:
        write_pages(recipe, all_packed, console)
        return
    for name, packed in all_packed.items():
        if recipe.id is None:
            console.print(show.listing(name, packed))
        elif recipe.id in packed.ids:
            show.sequences(packed, recipe, console)
            return
    if recipe.id is None:
        console.print("write id=ID to see one")
        return
    show.refuse_unknown(recipe.id, all_packed)


def write_pages(recipe: Recipe, all_packed: dict[str, "Dataset"], console: Console) -> None:
    """Write the pages of the data sets, with a progress bar."""
    from data_prep.pack.set_page import READERS, write_set_page
    from data_prep.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(recipe.model.checkpoint))
    total = sum(min(READERS, data.manifest["counts"]["kept"]) for data in all_packed.values())
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Writing readers", total=total)
        pages = [
            (name, write_set_page(data, name, tokenizer, recipe, lambda: bar.advance(task)))
            for name, data in all_packed.items()
        ]
    for name, page in pages:
        console.print(f"{name}: {page}")


def plan(recipe: Recipe, console: Console) -> None:
    """Print the plan and write it as `plan.json` and `plan.html`. Raise `ConfigError` if the model does not fit."""
    from data_prep.files import write_text
    from launch.run import prepare, same_run
    from recipes.plan import planner
    from recipes.plan.shown import plan_page, plan_summary, plan_table

    recipe = same_run.with_layout_of_run(recipe)
    made = planner.make_plan(recipe, prepare.sequences(recipe, console))
    found = plan_summary.summary(made, planner.released(made))
    for part in plan_table.plan_tables(found):
        console.print(part)
    folder = Path(recipe.cluster.root) / "plans" / recipe.run
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.json", json.dumps(found, indent=2) + "\n")
    write_text(folder / "plan.html", plan_page.render(found))
    console.print(f"plan: {folder / 'plan.html'} and plan.json")
    planner.refuse_too_large(made)


def check(recipe: Recipe, console: Console) -> None:
    """Run every check of the recipe, checkpoint, data, memory and disk; with slime also of the cluster's nodes and network. Print
    the table and raise `PreflightError` if a check failed."""
    from launch import checks
    from launch.preflight import checklist, machine, recipe_checks
    from launch.run import prepare, same_run

    recipe = same_run.with_layout_of_run(recipe)
    able = machine.machine(recipe)
    rows = recipe_checks.recipe_rows(recipe, lambda: prepare.packed(recipe, console), able)
    if recipe.engine.name is EngineName.slime and not able.failed:
        from launch.preflight import cluster_checks as on_cluster

        rows += on_cluster.connected_rows(recipe, console)
    console.print(checks.table("Before a GPU is held", rows, console.width))
    checks.warn(rows, console)
    checklist.refuse(rows)


def slurm(recipe: Recipe, console: Console) -> None:
    """Print the sbatch script that starts Ray on the nodes and runs the recipe there."""
    from launch.cluster.schedulers import slurm
    from launch.run import prepare
    from recipes.plan import planner
    from recipes.plan.saves import saves

    slurm.slurm(recipe)  # refuses what no scheduler runs, before the plan is made
    apart = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    made = planner.make_plan(recipe, prepare.sequences(recipe, apart))
    step = max((sum(parts.values()) for parts in made.step_seconds), default=0.0) if made.clock else 0.0
    save = saves(made.recipe, made.schedule.num_steps).seconds or 0.0
    console.file.write(slurm.slurm(recipe, step + save))


def kuberay(recipe: Recipe, console: Console) -> None:
    """Print the RayJob manifest that runs the recipe on Kubernetes."""
    from launch.cluster.schedulers import kuberay

    console.file.write(kuberay.kuberay(recipe))
