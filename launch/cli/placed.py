"""Stages that serve a model, on the nodes of a Ray job that have GPUs: its entry point may run on a node without any.

The stage runs as a command of its own inside a Ray task that holds the GPUs. A model that no node holds is served over several: then
tasks on the other nodes run SGLang's further ranks.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.cluster.connection import connected
from launch.cluster.image import packages
from launch.cluster.processes import end_session, end_with_parent
from launch.run import which_run
from launch.serving import sglang_command
from recipes.config import Recipe
from recipes.errors import PreflightError, SanityError
from recipes.paths import REPO, in_ray_job
from recipes.plan.serving import Servers, servers

PLACED = "LIMI_PLACED"  # variable of a command that runs where the GPUs are
PLACE_S = 120.0  # longest wait for free GPUs
_RANK = ("-m", "launch.cli.placed")  # SGLang on a further node: `serve_rank`


def elsewhere(recipe: Recipe) -> bool:
    """Return whether this command should run where the GPUs are: it is a job's entry point, and the model is served on GPUs."""
    return in_ray_job() and PLACED not in os.environ and sglang_command.on_gpus(recipe) and recipe.sanity.url is None


def own_words(recipe: Recipe) -> list[str]:
    """Return the overrides of this command without the cluster's address: the stage runs in the cluster already."""
    return [word for word in recipe.overrides if not word.startswith("cluster.address=")]


def run_placed(stage: str, recipe: Recipe, export: Path, words: list[str], console: Console) -> None:
    """Run a stage on the export where the GPUs are, and show its output.

    recipe: as `which_run.exported` returns it. words: the stage's overrides; they name the export.

    Raise `PreflightError` if the cluster has no such GPUs free within `PLACE_S`, and `SanityError` if the stage fails.
    """
    import ray

    wanted = servers(recipe, sglang_command.context(recipe, export))
    with connected(), _placed(wanted, recipe.cluster.root) as place:
        address = ray.get(place(0)(_meeting).remote())
        meeting = {sglang_command.MEETING: f"{address} {wanted.nodes}"} if wanted.nodes > 1 else {}
        ranks = [
            place(number)(_output, num_returns="streaming").remote([*_RANK, str(number), *words], meeting)
            for number in range(1, wanted.nodes)
        ]
        first = place(0)(_output, num_returns="streaming").remote(["launch/limi.py", stage, *words], meeting)
        status = 0
        try:
            for item in first:
                part = ray.get(item)
                if isinstance(part, int):
                    status = part
                else:
                    console.file.write(part)
                    console.file.flush()
        finally:
            for task in (first, *ranks):
                ray.cancel(task, recursive=True)
    if status:
        logs = f"the other nodes' output is in {rank_log(export, '*')}" if wanted.nodes > 1 else ""
        raise SanityError(f"{stage} failed with status {status} where the GPUs are, as it says above", logs)


@contextlib.contextmanager
def _placed(wanted: Servers, root: str) -> Iterator[Any]:
    """Reserve the GPUs. Yield a function that makes a remote function on one of the nodes, by its number. root: `cluster.root`."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    a_node = wanted.tp // wanted.nodes
    group = placement_group([{"GPU": a_node, "CPU": 1}] * wanted.nodes, strategy="STRICT_SPREAD")
    try:
        if not group.wait(PLACE_S):
            raise PreflightError(
                f"no {wanted.nodes} nodes with {a_node} free GPUs each within {PLACE_S:g} s",
                "wait for the job that holds them, or end it: ray job list, ray job stop ID",
            )

        def place(number: int) -> Any:
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            env = {"env_vars": {"PYTHONPATH": packages.python_path(root, str(REPO))}}

            def remote(function: Any, **options: Any) -> Any:
                # The meeting takes no GPU: it ends before the stage starts.
                gpus = 0 if function is _meeting else a_node
                task = ray.remote(function)
                return task.options(
                    num_gpus=gpus, num_cpus=0, max_retries=0, runtime_env=env, scheduling_strategy=there, **options
                )

            return remote

        yield place
    finally:
        remove_placement_group(group)


def _meeting() -> str:
    """Return HOST:PORT of this node, the port free now."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _output(command: list[str], env: dict[str, str]) -> Iterator[str | int]:
    """Run a command of this project on a node. Yield its output as it comes, and last its exit status. command: after Python."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=REPO,
        env={**own, **env, PLACED: "1", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - a task's process runs no thread that holds a lock here
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:  # noqa: UP028 - Ray sends into the generator, and a file takes nothing
            yield line
        yield process.wait()
    finally:
        end_session(process, patience=10.0)


def rank_log(export: Path, number: int | str) -> Path:
    """Return the log of SGLang's process on a further node, next to the export."""
    return export.parent / f"sglang-rank{number}.log"


def serve_rank(number: int, words: list[str]) -> int:
    """Run SGLang's process of one further node until the first node's has ended. Return its exit status."""
    from launch.serving.serve import PORT, thinks
    from recipes.compose.recipe import compose_recipe

    recipe, folder = which_run.exported(compose_recipe(words, "sanity"))
    command = sglang_command.command(recipe, folder, recipe.sanity.port or PORT, thinks(folder), number)
    with rank_log(folder, number).open("wb") as log:
        process = subprocess.Popen(
            command, env=sglang_command.environment(recipe, folder), stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - no thread holds a lock here
        )  # fmt: skip
        try:
            return process.wait()
        finally:
            end_session(process, patience=10.0)


if __name__ == "__main__":
    sys.exit(serve_rank(int(sys.argv[1]), sys.argv[2:]))
