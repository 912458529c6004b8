"""`make bench-gpu`: runs the measurements of the chosen rows in order, each in its own process, until the call's time limit. The next
call continues. A row is printed as soon as it is complete."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from launch.bench.gpu import gpu_report, table
from launch.bench.gpu.cases import CASES, Case, Planned, chosen_cases, chosen_sides, planned
from launch.bench.gpu.measurement import complete, fail, read_case, results, write_case
from launch.bench.gpu.software import ENV
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError, TrainError
from recipes.paths import REPO

DEFAULT = "h200x1"  # the cluster of a dry run, if the command line names none


def bench_gpu(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """Measure what is left, within `limit_s`, and print the table; with `smoke`, check the GPU instead.

    Raise `PreflightError` if the GPU is missing, and `TrainError` if a measurement failed for another reason than memory.
    """
    environment = environment_here()
    if recipe.smoke:
        from launch.bench.gpu.smoke import smoke

        if "gpu" in environment:
            recipe = compose_recipe(machine_words(recipe, _cluster(recipe, environment)))
        return smoke.smoke_gpu(recipe, console)
    words = machine_words(recipe, _cluster(recipe, environment))
    if not any(word.startswith("cluster.host_memory_gb=") for word in words):
        words.append(f"cluster.host_memory_gb={psutil.virtual_memory().total / 1e9:.0f}")
    started, failed, attempts = time.monotonic(), [], 0
    chosen, sides = chosen_cases(recipe.bench, cases), chosen_sides(recipe.bench)
    folders = [prepared(recipe, planned(case, words), environment) for case in chosen]
    for folder, side in left(folders, sides):
        one = read_case(folder)
        spent, takes = time.monotonic() - started, one.part_seconds(side)
        if attempts and spent + takes > recipe.limit_s:
            console.print(
                f"After {spent:.0f} s, '{one.case.name}, {side}' takes about {takes:.0f} s more, over limit_s={recipe.limit_s}: "
                "rerun the same command to continue"
            )
            break
        with console.status(f"{one.case.name}: {side}, about {takes:.0f} s"):
            succeeded, attempts = measured(folder, side, recipe.limit_s - spent), attempts + 1
        if not succeeded:
            failed.append(f"{one.case.name}, {side}: {folder / side}.log")
        elif not [*left([folder], sides)]:
            console.print(table.line(one, results(folder)))
    console.print(gpu_report.tables([(read_case(f), results(f)) for f in folders]))
    if failed:
        raise TrainError(
            f"{len(failed)} measurements failed: {'; '.join(failed)}. One that ran out of time goes on in the next call; another is "
            "measured again only after its .json is removed"
        )


def show_bench_gpu(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """Print the shapes, layouts, memory and calls in order (`dry_run=true`). This works on any machine."""
    rows = [planned(case, machine_words(recipe, DEFAULT)) for case in chosen_cases(recipe.bench, cases)]
    table.show_plan(console, rows, chosen_sides(recipe.bench), recipe.limit_s)


def machine_words(recipe: Recipe, cluster: str) -> list[str]:
    """Return the overrides of the command line that apply to all cases. cluster: used if the command line names none.

    Raise `ConfigError` if the command line's cluster has more than one GPU.
    """
    named = recipe.gpu.memory_mib is not None
    if named and recipe.cluster.nodes * recipe.cluster.gpus_per_node > 1:
        raise ConfigError(
            f"bench-gpu measures one GPU, but cluster={recipe.cluster.name} has more", "write cluster=h100x1"
        )
    shared = ("cluster.", "gpu.", "layout.", "optim.lr=")
    words = [w for w in recipe.overrides if w.startswith(shared) and not w.startswith("cluster.root")]
    return [f"cluster={recipe.cluster.name if named else cluster}", f"cluster.root={recipe.cluster.root}", *words]


def environment_here() -> dict[str, Any]:
    """Return the versions and the GPU, read in a process of its own: this one must not hold the GPU's memory."""
    command = [sys.executable, "-m", "launch.bench.gpu.software"]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    environment: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return environment


def _cluster(recipe: Recipe, environment: dict[str, Any]) -> str:
    """Return the cluster of this machine's GPU. Raise `PreflightError` if it is not the wanted GPU, or none that is known."""
    gpu = environment.get("gpu", "no GPU")
    kinds = {"H100": "h100x1", "H200": "h200x1"}
    cluster = next((c for name, c in kinds.items() if name in gpu), None)
    if recipe.gpu.memory_mib is not None and recipe.gpu.name.upper() in gpu:
        return recipe.cluster.name
    if cluster is None or recipe.gpu.memory_mib is not None:
        wanted = recipe.gpu.name.upper() if recipe.gpu.memory_mib is not None else " or ".join(kinds)
        raise PreflightError(
            f"bench-gpu needs {wanted}, but this machine has {gpu}",
            "`dry_run=true` shows what it would measure, and smoke=true runs its checks on any machine",
        )
    return cluster


def prepared(recipe: Recipe, one: Planned, environment: dict[str, Any]) -> Path:
    """Prepare a case's folder and return it. Remove measurements of another model, layout, kernel or software, and keep all others."""
    folder = Path(recipe.cluster.root) / "bench-gpu" / one.recipe.cluster.name / one.case.key
    if (folder / "config.yaml").is_file() and _identity(read_case(folder)) != _identity(one):
        shutil.rmtree(folder)
    write_case(folder, one)
    kernel = one.recipe.gpu.attention.value
    for side, figures in results(folder).items():
        same_kernel = side == "theirs" or figures.get("attention", kernel) == kernel
        software = {name: value for name, value in figures["environment"].items() if name != "memory"}
        if not (software.items() <= environment.items() and same_kernel):
            (folder / f"{side}.json").unlink()
    return folder


def _identity(one: Planned) -> tuple[Any, ...]:
    """Return what a measurement depends on. The machine's host memory, limits and the number of steps do not matter."""
    r = one.recipe
    return one.case.sequences, r.model, r.layout, r.gpu.name, r.optim.lr


def left(folders: Sequence[Path], sides: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the incomplete measurements (folder, side), row by row."""
    return (
        (folder, side)
        for folder in folders
        for side in sides
        if not complete(results(folder).get(side), read_case(folder).case.steps)
    )


def measured(folder: Path, side: str, timeout: float) -> bool:
    """Run one measurement in its own process, with its output in `SIDE.log`. Return whether it succeeded. timeout: seconds."""
    command = [sys.executable, "-m", "launch.bench.gpu.measurement", side, str(folder)]
    with (folder / f"{side}.log").open("a", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, cwd=REPO, env=ENV | dict(os.environ), stdout=log, stderr=log, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            log.write(f"stopped after {timeout:.0f} s, the rest of limit_s; write a larger limit_s\n")
            return False
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        fail(folder, side, f"its process was ended by {name}; a machine whose memory is full ends processes so")
    return done.returncode == 0
