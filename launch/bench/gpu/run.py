"""`make bench-gpu`: every measurement of every row in turn, each in a process of its own, until the call's time is up; the next call
goes on. A row is shown as soon as it is whole."""

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

DEFAULT = "h200x1"  # that a dry run plans for where the command line names no cluster
ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}


def run(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """Raises `PreflightError` without the GPU, and `TrainError` where a measurement failed otherwise than by too little memory."""
    environment = environment_here()
    words = machine_words(recipe, _cluster(recipe, environment))
    if not any(word.startswith("cluster.host_memory_gb=") for word in words):
        words.append(f"cluster.host_memory_gb={psutil.virtual_memory().total / 1e9:.0f}")
    started, failed, made = time.monotonic(), [], 0
    folders = [prepared(recipe, planned(case, words), environment) for case in cases]
    for folder, part in left(folders):
        one = read_case(folder)
        spent, takes = time.monotonic() - started, one.part_seconds(part)
        if made and spent + takes > recipe.limit_s:
            console.print(
                f"{spent:.0f} s, and '{one.case.name}, {part}' takes about {takes:.0f} more of limit_s={recipe.limit_s}: the same "
                "command goes on"
            )
            break
        with console.status(f"{one.case.name}: {part}, about {takes:.0f} s"):
            ended, made = measured(folder, part, recipe.limit_s - spent), made + 1
        if not ended:
            failed.append(f"{one.case.name}, {part}: {folder / part}.log")
        elif not [*left([folder])]:
            console.print(table.line(one, results(folder)))
    table.show(console, [(read_case(f), results(f)) for f in folders])
    if failed:
        raise TrainError(f"{len(failed)} measurements failed, and the next call tries them again: {'; '.join(failed)}")


def show(recipe: Recipe, console: Console, cases: Sequence[Case] = CASES) -> None:
    """`dry_run=true`: shapes, layouts, memory and the pieces, in order; on any machine."""
    table.show_plan(console, [planned(case, machine_words(recipe, DEFAULT)) for case in cases], recipe.limit_s)


def machine_words(recipe: Recipe, cluster: str) -> list[str]:
    """Of the command line those that all cases take, with its cluster where it names one. Raises `ConfigError` where that is not
    one GPU."""
    named = recipe.gpu.memory_mib is not None
    if named and recipe.cluster.nodes * recipe.cluster.gpus_per_node > 1:
        raise ConfigError(
            f"bench-gpu measures one GPU, and cluster={recipe.cluster.name} is more", "write cluster=h100x1"
        )
    shared = ("cluster.", "gpu.", "layout.", "optim.lr=")
    words = [w for w in recipe.words if w.startswith(shared) and not w.startswith("cluster.root")]
    return [f"cluster={recipe.cluster.name if named else cluster}", f"cluster.root={recipe.cluster.root}", *words]


def environment_here() -> dict[str, Any]:
    """`environment.environment`, from a process of its own: asking for a GPU's name takes some of its memory."""
    command = [sys.executable, "-m", "launch.bench.gpu.software"]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cluster(recipe: Recipe, environment: dict[str, Any]) -> str:
    """By the GPU's name."""
    found = environment.get("gpu", "no GPU")
    kinds = {"H100": "h100x1", "H200": "h200x1"}
    cluster = next((c for name, c in kinds.items() if name in found), None)
    if recipe.gpu.memory_mib is not None and recipe.gpu.name.upper() in found:
        return recipe.cluster.name
    if cluster is None or recipe.gpu.memory_mib is not None:
        wanted = recipe.gpu.name.upper() if recipe.gpu.memory_mib is not None else " or ".join(kinds)
        raise PreflightError(
            f"bench-gpu wants {wanted}, and here is {found}", "`dry_run=true` shows what it would measure"
        )
    return cluster


def prepared(recipe: Recipe, one: Planned, environment: dict[str, Any]) -> Path:
    """The case's folder; what was measured there of another recipe or in another environment goes."""
    folder = Path(recipe.cluster.root) / "bench-gpu" / one.recipe.cluster.name / one.case.key
    if (folder / "config.yaml").is_file() and (folder / "config.yaml").read_bytes() != to_yaml(one.recipe).encode():
        shutil.rmtree(folder)
    write_case(folder, one)
    for part, found in results(folder).items():
        if not found["environment"].items() <= environment.items():  # the CPU's part names no GPU
            (folder / f"{part}.json").unlink()
    return folder


def left(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Measurements that are not there, row by row."""
    return (
        (folder, part)
        for folder in folders
        for part in read_case(folder).case.parts
        if not (folder / f"{part}.json").is_file()
    )


def measured(folder: Path, part: str, timeout: float) -> bool:
    """Whether the measurement's process ended well; what it printed is in `PART.log`."""
    env = ENV | dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if part == "cpu" else {})
    command = [sys.executable, "-m", "launch.bench.gpu.measurement", part, str(folder)]
    with (folder / f"{part}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, cwd=REPO, env=env, stdout=log, stderr=log, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            log.write(f"ended after {timeout:.0f} s, what was left of limit_s; write a larger limit_s\n")
            return False
    return done.returncode == 0


def results(folder: Path) -> dict[str, Any]:
    """By part; those that are there."""
    found = ((part, folder / f"{part}.json") for part in read_case(folder).case.parts)
    return {
        part: json_file.read(path, "remove that file: it is measured again") for part, path in found if path.is_file()
    }
