"""`make bench`: the schedule, planning, the embedded engine and the data stage, measured."""

import itertools
import tempfile
from pathlib import Path

from rich.console import Console

from data_prep import bench as data_bench
from launch import prepare
from launch.megatron import bench as engine_bench
from recipes import bench as recipe_bench
from recipes import published
from recipes.config import Recipe


def run(recipe: Recipe, console: Console) -> None:
    """Measures the assignment inside a step, planning, the embedded engine, and the data stage against the tokenizer alone."""
    modes = " | ".join(f"slime's {mode}" for mode in recipe_bench.SLIME)
    console.print(f"| makespan / bound: mean, worst | ours | {modes} | to reach |\n|---|---|---|---|---|---|")
    for row in recipe_bench.assignment_rows():
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| planning | seconds |\n|---|---|")
    for row in itertools.chain(recipe_bench.planning_rows(), recipe_bench.command_rows()):
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| TFLOP/s a GPU | published | predicted | error |\n|---|---|---|---|")
    for figures in published.rows():
        console.print(f"| {' | '.join(figures)} |")
    root = Path(recipe.cluster.root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench.") as folder:
        console.print("\n| embedded engine | measured | to reach |\n|---|---|---|")
        for engine_row in engine_bench.rows(Path(folder)):
            console.print(f"| {' | '.join(engine_row)} |")
        console.print("\n| layout | ranks | tokens/s |\n|---|---|---|")
        for layout_row in engine_bench.layout_rows(Path(folder), engine_bench.names_here()):
            console.print(f"| {' | '.join(layout_row)} |")
    console.print()
    prepare.base(recipe, console)
    data_bench.run(recipe, console)
