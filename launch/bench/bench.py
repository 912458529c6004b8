"""`make bench`: measurements of the schedule, planning, the embedded engine, the sandbox and the data stage."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from launch.bench import data_bench, engine_bench, schedule_bench
from launch.run import prepare
from launch.sanity.loop import sandbox
from recipes.config import Recipe
from recipes.plan import published

CALLS = 20


def run_bench(recipe: Recipe, console: Console) -> None:
    """Measure and print: the assignment inside a step, planning, the embedded engine, the sandbox, and the data stage compared with
    the tokenizer alone."""
    modes = " | ".join(f"slime's {mode}" for mode in schedule_bench.SLIME)
    console.print(f"| makespan / bound: mean, worst | ours | {modes} | to reach |\n|---|---|---|---|---|---|")
    for row in schedule_bench.assignment_rows():
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| planning | seconds |\n|---|---|")
    for row in itertools.chain(schedule_bench.planning_rows(), schedule_bench.command_rows()):
        console.print(f"| {' | '.join(row)} |")
    console.print("\n| TFLOP/s a GPU | published | predicted | error |\n|---|---|---|---|")
    for figures in published.published_rows():
        console.print(f"| {' | '.join(figures)} |")
    root = Path(recipe.cluster.root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench.") as folder:
        console.print("\n| embedded engine | measured | to reach |\n|---|---|---|")
        for engine_row in engine_bench.engine_rows(Path(folder)):
            console.print(f"| {' | '.join(engine_row)} |")
        console.print("\n| layout | ranks | tokens/s |\n|---|---|---|")
        for layout_row in engine_bench.layout_rows(Path(folder), engine_bench.names_here()):
            console.print(f"| {' | '.join(layout_row)} |")
    console.print("\n| sandbox of tool calls | measured | to reach |\n|---|---|---|")
    for sandbox_row in sandbox_rows():
        console.print(f"| {' | '.join(sandbox_row)} |")
    console.print()
    prepare.base(recipe, console)
    data_bench.bench_data(recipe, console)


def sandbox_rows() -> Iterator[tuple[str, str, str]]:
    """Yield rows for the sandbox: what is measured, the figure, and the target."""
    if why := sandbox.available():
        yield "a tool's call", f"not measured: {why}", ""
        return
    started = time.perf_counter()
    with sandbox.Sandbox({"notes.txt": "oak\n", "nothing.py": ""}) as box:
        yield "its start", f"{time.perf_counter() - started:.3f} s", ""
        calls = {"read_file": {"path": "notes.txt"}, "run": {"command": "python nothing.py"}}
        for name, arguments in calls.items():
            seconds = []
            for _ in range(CALLS):
                started = time.perf_counter()
                box.call(name, arguments)
                seconds.append(time.perf_counter() - started)
            yield f"a call of {name}, median of {CALLS}", f"{statistics.median(seconds):.3f} s", "at most 0.2 s"
