"""Checks of the connected Ray cluster before a GPU is taken: its nodes, what each has, their shared folder, and their network.

Everything that is started here has ended when `rows` returns.
"""

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from launch.checks import Check
from launch.cluster.connection import connected
from launch.cluster.image.pins import PACKAGES
from launch.cluster.ray_errors import logs
from launch.preflight import network, node_report
from launch.preflight import node_checks as here
from launch.preflight.checklist import Found, check
from launch.preflight.node_checks import Reports, listed
from launch.slime import contract, installed
from launch.slime.arguments import arguments, on_cpu
from launch.slime.job import environment, own_resources
from recipes.config import Recipe
from recipes.layout import world_size
from recipes.paths import in_ray_job

ANSWER_S = 60.0  # longest wait for a node's report: the first process there must import its packages
FLAGS_S = 180.0  # longest wait for slime's parser: slime imports SGLang, among others
NETWORK_S = 30.0  # time for messages between the ranks


@dataclass
class Known:
    """Results of one check that later checks need; None if the check failed."""

    alive: dict[str, dict[str, Any]] | None = None  # Ray's nodes by address
    taken: list[dict[str, Any]] | None = None  # nodes with enough GPUs, as many as the recipe uses
    reports: Reports | None = None
    paths: list[str] | None = None  # checkpoint and data, if both exist on this machine
    answering: dict[str, dict[str, Any]] | None = None  # nodes that sent a report


def connected_rows(r: Recipe, console: Console, seconds: float = NETWORK_S) -> list[Check]:
    """Connect to the Ray of this job or of this machine, run all checks, and disconnect.

    The first rows say whether a Ray can be reached. seconds: as for `rows`.
    """
    # A job's log is not a terminal and shows no progress, so that the expected time is said first.
    console.print("Checking the cluster (30 s to 2 minutes)")
    ours = [] if in_ray_job() else [python(r)]
    if any(row.fix for row in ours):
        return ours
    found: list[Check] = []
    return [*ours, reach(r, found, seconds), *found]


@check("Python", "Ray processes that never start and are waited for until a timeout")
def python(r: Recipe) -> Found:
    """Check the Python with which a Ray of this machine starts its processes."""
    given = str(r.engine.python)
    program = "import sys, ray; print(f'Ray {ray.__version__} for Python {sys.version_info[0]}.{sys.version_info[1]}')"
    wanted = f"Ray {ray.__version__} for Python {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        done = subprocess.run([given, "-c", program], capture_output=True, text=True, check=False)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    except OSError as error:
        said = f"{error.strerror}"
    fix = (
        "write SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER of their checkouts on make's line, which creates an environment for slime, "
        "or engine.python=PYTHON of an environment that has it"
    )
    return Found(
        f"engine.python={given}: {said.splitlines()[-1] if said else 'no output'}",
        wanted,
        "" if said == wanted else fix,
    )


@check("Ray", "a cluster that does not answer")
def reach(r: Recipe, found: list[Check], seconds: float) -> Found:
    with connected(**own_resources(r)):
        version = f"Ray {ray.__version__}"
        found += cluster_rows(r, seconds)
    return Found(version)


def cluster_rows(r: Recipe, seconds: float = NETWORK_S, start: float = network.START_S) -> list[Check]:
    """Return the rows of all checks of the cluster.

    seconds: longest time for messages between the ranks; 0 skips the network checks. start: longest wait for the ranks' processes.
    """
    known = Known()
    return [
        nodes(r, known),
        free_gpus(r, known.taken),
        cpus(r, known.taken),
        answers(r, known, known.alive),
        here.numpy(r, known.reports),
        here.software(known.reports),
        here.transformer_engine(r, known.reports),
        here.slime(r, known.reports),
        here.megatron(r, known.reports),
        here.contract(known.reports),
        flags(r, known.answering),
        here.packages(known.reports),
        here.files(r, known.reports, known.paths),
        here.shared_memory(r, known.reports),
        here.locked_memory(r, known.reports),
        here.wandb(r, known.reports),
        shared_folder(r, known.answering),
        *_network(r, known, seconds, start),
    ]


@check("nodes", "waiting for GPUs that the cluster does not have")
def nodes(r: Recipe, known: Known) -> Found:
    alive = [n for n in ray.nodes() if n["Alive"]]
    addresses = [n["NodeManagerAddress"] for n in alive]
    names = [a if addresses.count(a) == 1 else f"{a}#{i}" for i, a in enumerate(addresses)]
    known.alive = dict(zip(names, alive, strict=True))
    gpus = [int(n["Resources"].get("GPU", 0)) for n in alive]
    taken = [n for n, count in zip(alive, gpus, strict=True) if count >= r.cluster.gpus_per_node]
    text = f"{len(alive)} alive, GPUs: {', '.join(map(str, gpus))}"
    limit = f"cluster.nodes {r.cluster.nodes} x cluster.gpus_per_node {r.cluster.gpus_per_node}"
    if len(taken) >= r.cluster.nodes:
        known.taken = taken[: r.cluster.nodes]
        return Found(text, limit)
    most = max(gpus, default=0)
    fewer = f"write cluster.nodes={gpus.count(most)} cluster.gpus_per_node={most}, or " if most else ""
    more = "add nodes to the cluster: ray start --address=HEAD:6379, on each"
    return Found(
        text, limit, fewer + (more if in_ray_job() else "write cluster.address=http://HEAD:8265 of a larger cluster")
    )


@check("free GPUs", "waiting for GPUs that another job holds")
def free_gpus(r: Recipe, taken: list[dict[str, Any]]) -> Found:
    free, wanted = int(ray.available_resources().get("GPU", 0)), world_size(r)
    fix = "wait for the job that holds them, or end it: ray job list, ray job stop ID"
    return Found(f"{free} free", f"{wanted}", "" if free >= wanted else fix)


@check("CPUs", "slime's placement, which waits for one CPU per GPU and one more for its rollout manager")
def cpus(r: Recipe, taken: list[dict[str, Any]]) -> Found:
    counts = [int(n["Resources"].get("CPU", 0)) for n in taken]
    a_node = r.cluster.gpus_per_node
    total = int(ray.cluster_resources().get("CPU", 0))
    limit = f"{a_node} per node, {world_size(r) + 1} in all"
    enough = min(counts) >= a_node and total > world_size(r)
    fix = f"restart the nodes with more CPUs: ray start --num-cpus={a_node + 1}"
    return Found(f"{', '.join(map(str, counts))}, {total} in all", limit, "" if enough else fix)


@check("answers", "nodes on which no process of the project starts")
def answers(r: Recipe, known: Known, alive: dict[str, dict[str, Any]]) -> Found:
    roots = str(r.engine.slime_root), str(r.engine.megatron_root)
    versions = ["numpy", "torch", "ray", "transformer_engine"]
    paths = [str(Path(r.model.checkpoint, "config.json")), r.data.out]
    known.paths = paths if all(Path(path).exists() for path in paths) else None
    touches = [*contract.EVERYWHERE, *(contract.ON_A_CPU if on_cpu(r) else ())]
    said, silent = _on_each(r, alive, node_report.report, lambda _: (versions, [*PACKAGES], *roots, touches, paths))
    known.reports = said or None
    known.answering = {name: alive[name] for name in said} or None
    limit = f"within {ANSWER_S:g} s"
    if silent:
        out = ", or take it out: ray stop" if in_ray_job() else ""
        return Found(listed(silent), limit, f"read that node's logs in {logs()}{out}")
    return Found(f"{len(said)} of {len(alive)} nodes answered", limit)


@check("slime's flags", "a flag that slime does not know, which it accepts silently")
def flags(r: Recipe, answering: dict[str, dict[str, Any]]) -> Found:
    """Check the recipe's flags with slime's own parser on the first node."""
    name, one = next(iter(answering.items()))
    said, failed = _on_each(r, {name: one}, installed.flags, lambda _: (on_cpu(r),), FLAGS_S)
    if failed:
        fix = f"on that node: {r.engine.python} -c 'import slime.utils.arguments', and fix what it says"
        return Found(f"slime's parser does not run: {failed[name]}", "it runs", fix)
    given = {word for word in arguments(r, 1, r.model.checkpoint) if word.startswith("--")}
    if unknown := sorted(given - {*said[name]}):
        return Found(f"unknown: {', '.join(unknown)}", f"{len(said[name])} flags", here.CHECKED)
    return Found(f"all {len(given)} are known", f"{len(said[name])} flags")


@check("cluster.root", "checkpoints and data that one node writes but another does not see")
def shared_folder(r: Recipe, answering: dict[str, dict[str, Any]]) -> Found:
    folder = os.path.join(r.cluster.root, f".check-{secrets.token_hex(8)}")
    nonces = {name: secrets.token_hex(16) for name in answering}
    limit, fix = (
        "written and read by every node",
        "write cluster.root=FOLDER on a file system that every node can write to",
    )
    try:
        _, failed = _on_each(r, answering, node_report.write_nonce, lambda name: (folder, name, nonces[name]))
        if failed:
            return Found(f"'{r.cluster.root}': {listed(failed)}", limit, fix)
        read, failed = _on_each(r, answering, node_report.unread, lambda _: (folder, nonces))
    finally:
        _on_each(r, answering, node_report.remove, lambda _: (folder,))
    blind = failed | {name: f"does not see what {', '.join(others)} wrote" for name, others in read.items() if others}
    if blind:
        return Found(f"'{r.cluster.root}': {listed(blind)}", limit, fix)
    return Found(f"'{r.cluster.root}': {len(read)} of {len(answering)} nodes", limit)


def _network(r: Recipe, known: Known, seconds: float, start: float) -> list[Check]:
    """Return the rows of both exchanges. They are measured together: a failure shows in both rows."""
    if not seconds:
        return []
    speeds: dict[str, float] | Exception | None = None
    if known.taken is not None:
        a_node = network.CPU_RANKS if on_cpu(r) else r.cluster.gpus_per_node
        env = runtime_env(r)
        try:
            speeds = network.measured(known.taken, a_node, not on_cpu(r), env, seconds, start)
        except Exception as error:  # becomes a row, like an error of any check
            speeds = error
    return [exchange(name)(r, speeds, name) for name in ("all-reduce", "all-to-all")]


def exchange(name: str) -> Callable[..., Check]:
    """Return the check of one exchange, all-reduce or all-to-all."""
    return check(name, "a network at a fraction of its speed, which slows every step")(_exchange)


def _exchange(r: Recipe, speeds: dict[str, float] | Exception, name: str) -> Found:
    """Check a measured speed (bytes of a rank's message per second), converted to what each GPU sends to other nodes.

    An all-reduce's ring crosses from node to node once for all GPUs of a node.
    """
    if isinstance(speeds, Exception):
        raise speeds
    a_node = network.CPU_RANKS if on_cpu(r) else r.cluster.gpus_per_node
    ranks = a_node * r.cluster.nodes
    if ranks == 1:
        return Found("one rank exchanges nothing", judged=False)
    speed = speeds[name] / 1e9
    bus = speed * (ranks - 1) / ranks * (2 if name == "all-reduce" else 1)
    text = f"{bus:.3g} GB/s on the bus of {ranks} ranks"
    if on_cpu(r):
        return Found(f"{text}, over gloo; not judged on a CPU", judged=False)
    if r.cluster.nodes == 1 or r.cluster.network_gb_s is None:
        return Found(f"{text}; one node, or cluster.network_gb_s is not set", judged=False)
    between = bus / a_node if name == "all-reduce" else speed * (ranks - a_node) / ranks
    half = r.cluster.network_gb_s / 2
    return Found(
        f"{text}, {between:.3g} GB/s between nodes for each GPU",
        f"{half:g} GB/s, half of cluster.network_gb_s",
        ""
        if between >= half
        else f"write cluster.network_gb_s={between:.3g} if the network is no faster; {network.fix(gpu=True)}",
    )


def runtime_env(r: Recipe) -> dict[str, Any]:
    """Return Ray's runtime environment of slime's processes.

    In a job they use the cluster's own Python, and on a Ray of this machine `engine.python`.
    """
    python = {} if in_ray_job() else {"py_executable": str(r.engine.python)}
    return {"env_vars": environment(r), **python}


def _on_each(
    r: Recipe,
    alive: dict[str, dict[str, Any]],
    function: Callable[..., Any],
    given: Callable[[str], tuple[Any, ...]],
    seconds: float | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function once on every node. Return the results by node, and the reasons of failures by node.

    given: returns the arguments for a node's name. seconds: longest wait, by default `ANSWER_S`.
    """
    task, env, seconds = ray.remote(function), runtime_env(r), seconds or ANSWER_S
    calls = {}
    for name, one in alive.items():
        there = NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
        bound = task.options(num_cpus=0, max_retries=0, runtime_env=env, scheduling_strategy=there)
        calls[name] = bound.remote(*given(name))
    _, late = ray.wait([*calls.values()], num_returns=len(calls), timeout=seconds)
    returned, failed = {}, {}
    for name, call in calls.items():
        if call in late:
            ray.cancel(call, force=True)
            failed[name] = f"no answer within {seconds:g} s"
            continue
        try:
            returned[name] = ray.get(call)
        except RayError as error:
            failed[name] = str(error).strip().splitlines()[-1]
    return returned, failed
