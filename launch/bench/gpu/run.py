"""`make bench-gpu`: runs all measurements of all rows in order, each in its own process, until the call's time limit. The next call
continues. A row is printed as soon as it is complete."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from launch.bench.gpu import table
from launch.bench.gpu.cases import CASES, Case, Planned, planned
from launch.bench.gpu.measurement import read_case, write_case
from recipes import json_file
from recipes.compose.recipe import to_yaml
from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError, TrainError
from recipes.paths import REPO

DEFAULT = "h200x1"  # the cluster of a dry run, if the command line names none
ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}


def bench_gpu(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """Measure what is left, within `limit_s`, and print the table.

    Raise `PreflightError` if the GPU is missing, and `TrainError` if a measurement failed for another reason than memory.
    """
    environment = environment_here()
    words = machine_words(recipe, _cluster(recipe, environment))
    if not any(word.startswith("cluster.host_memory_gb=") for word in words):
        words.append(f"cluster.host_memory_gb={psutil.virtual_memory().total / 1e9:.0f}")
    started, failed, attempts = time.monotonic(), [], 0
    folders = [prepared(recipe, planned(case, words), environment) for case in cases]
    for folder, part in left(folders):
        one = read_case(folder)
        spent, takes = time.monotonic() - started, one.part_seconds(part)
        if attempts and spent + takes > recipe.limit_s:
            console.print(
                f"After {spent:.0f} s, '{one.case.name}, {part}' takes about {takes:.0f} s more, over limit_s={recipe.limit_s}: "
                "rerun the same command to continue"
            )
            break
        with console.status(f"{one.case.name}: {part}, about {takes:.0f} s"):
            succeeded, attempts = measured(folder, part, recipe.limit_s - spent), attempts + 1
        if not succeeded:
            failed.append(f"{one.case.name}, {part}: {folder / part}.log")
        elif not [*left([folder])]:
            console.print(table.line(one, results(folder)))
    table.show_table(console, [(read_case(f), results(f)) for f in folders])
    if failed:
        raise TrainError(f"{len(failed)} measurements failed; the next call retries them: {'; '.join(failed)}")


def show_bench_gpu(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """Print the shapes, layouts, memory and calls in order (`dry_run=true`). This works on any machine."""
    table.show_plan(console, [planned(case, machine_words(recipe, DEFAULT)) for case in cases], recipe.limit_s)


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
    """Return `software.environment` from a separate process, because asking for a GPU's name takes some of its memory."""
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
            f"bench-gpu needs {wanted}, but this machine has {gpu}", "`dry_run=true` shows what it would measure"
        )
    return cluster


def prepared(recipe: Recipe, one: Planned, environment: dict[str, Any]) -> Path:
    """Prepare a case's folder and return it. Remove measurements of another recipe or of another environment."""
    folder = Path(recipe.cluster.root) / "bench-gpu" / one.recipe.cluster.name / one.case.key
    if (folder / "config.yaml").is_file() and (folder / "config.yaml").read_bytes() != to_yaml(one.recipe).encode():
        shutil.rmtree(folder)
    write_case(folder, one)
    for part, figures in results(folder).items():
        if (
            not figures["environment"].items() <= environment.items()
        ):  # "<=": the environment of the CPU part has no GPU
            (folder / f"{part}.json").unlink()
    return folder


def left(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield the missing measurements (folder, part), row by row."""
    return (
        (folder, part)
        for folder in folders
        for part in read_case(folder).case.parts
        if not (folder / f"{part}.json").is_file()
    )


def measured(folder: Path, part: str, timeout: float) -> bool:
    """Run one measurement in its own process, with its output in `PART.log`. Return whether it succeeded. timeout: seconds."""
    env = ENV | dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if part == "cpu" else {})
    command = [sys.executable, "-m", "launch.bench.gpu.measurement", part, str(folder)]
    with (folder / f"{part}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, cwd=REPO, env=env, stdout=log, stderr=log, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            log.write(f"stopped after {timeout:.0f} s, the rest of limit_s; write a larger limit_s\n")
            return False
    return done.returncode == 0


def results(folder: Path) -> dict[str, Any]:
    """Return the existing measurements of a case by part."""
    files = ((part, folder / f"{part}.json") for part in read_case(folder).case.parts)
    return {
        part: json_file.read_json(path, "remove that file: the next call measures it anew")
        for part, path in files
        if path.is_file()
    }
