"""What is checked on the Ray cluster that this process is connected to, before a GPU is held: its nodes, what each of them has, the
folder they share, and the network between them. Everything started here has ended when `rows` returns."""

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
from launch.cluster.ray_errors import logs
from launch.preflight import network, node_report
from launch.preflight import node_checks as here
from launch.preflight.checklist import Found, check
from launch.preflight.node_checks import Reports, listed
from launch.slime import contract, installed
from launch.slime.arguments import arguments, on_cpu
from launch.slime.job import environment, own_resources
from launch.slime.pins import PACKAGES
from recipes.config import Recipe
from recipes.layout import world_size
from recipes.paths import in_ray_job

ANSWER_S = 60.0  # longest wait for what a node says of itself: a first process there imports its packages
FLAGS_S = 180.0  # of slime's own imports, SGLang's among them
NETWORK_S = 30.0  # of messages between the ranks


@dataclass
class Known:
    """What one check found out and later ones need; None where it could not."""

    alive: dict[str, dict[str, Any]] | None = None  # Ray's nodes by address
    taken: list[dict[str, Any]] | None = None  # those with enough GPUs, as many as the recipe takes
    reports: Reports | None = None
    paths: list[str] | None = None  # checkpoint and data, where both are here
    answering: dict[str, dict[str, Any]] | None = None  # nodes that reported


def connected_rows(r: Recipe, console: Console, seconds: float = NETWORK_S) -> list[Check]:
    """The checks on the Ray of this job, or of this machine, connected to for as long; whether there is one is the first.
    seconds: as `rows` takes them."""
    console.print(
        "Checking the cluster, half a minute to two"
    )  # a job's log is no terminal: nothing turns there meanwhile
    ours = [] if in_ray_job() else [python(r)]
    if any(row.fix for row in ours):
        return ours
    found: list[Check] = []
    return [*ours, reach(r, found, seconds), *found]


@check("Python", "processes of Ray's that never start, each waited for as long as a slow one")
def python(r: Recipe) -> Found:
    """The one by which a Ray of this machine starts its processes."""
    given = str(r.engine.python)
    program = "import sys, ray; print(f'Ray {ray.__version__} for Python {sys.version_info[0]}.{sys.version_info[1]}')"
    wanted = f"Ray {ray.__version__} for Python {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        done = subprocess.run([given, "-c", program], capture_output=True, text=True, check=False)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
    except OSError as error:
        said = f"{error.strerror}"
    fix = (
        "write SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER of their checkouts on make's line, which makes an environment for slime, "
        "or engine.python=PYTHON of one that has it"
    )
    return Found(
        f"engine.python={given}: {said.splitlines()[-1] if said else 'says nothing'}",
        wanted,
        "" if said == wanted else fix,
    )


@check("Ray", "a cluster that does not answer")
def reach(r: Recipe, found: list[Check], seconds: float) -> Found:
    with connected(**own_resources(r)):
        version = f"Ray {ray.__version__}"
        found += rows(r, seconds)
    return Found(version)


def rows(r: Recipe, seconds: float = NETWORK_S, start: float = network.START_S) -> list[Check]:
    """Every check of the cluster. seconds: of messages between the ranks at most, none where 0; start: longest wait for their
    processes."""
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
        text, limit, fewer + (more if in_ray_job() else "write cluster.address=http://HEAD:8265 of a larger one")
    )


@check("free GPUs", "waiting for GPUs that another job holds")
def free_gpus(r: Recipe, taken: list[dict[str, Any]]) -> Found:
    free, wanted = int(ray.available_resources().get("GPU", 0)), world_size(r)
    fix = "wait for the job that holds them, or end it: ray job list, ray job stop ID"
    return Found(f"{free} free", f"{wanted}", "" if free >= wanted else fix)


@check("CPUs", "slime's placement, which waits for a CPU beside every GPU and one for its rollout manager")
def cpus(r: Recipe, taken: list[dict[str, Any]]) -> Found:
    counts = [int(n["Resources"].get("CPU", 0)) for n in taken]
    a_node = r.cluster.gpus_per_node
    total = int(ray.cluster_resources().get("CPU", 0))
    limit = f"{a_node} a node, {world_size(r) + 1} in all"
    enough = min(counts) >= a_node and total > world_size(r)
    fix = f"start the nodes anew with more: ray start --num-cpus={a_node + 1}"
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
        return Found(listed(silent), limit, f"see that node's logs in {logs()}{out}")
    return Found(f"{len(said)} of {len(alive)} nodes", limit)


@check("slime's flags", "a flag that slime does not know, which it takes without a word")
def flags(r: Recipe, answering: dict[str, dict[str, Any]]) -> Found:
    """Asked of slime's own parser, on the first node."""
    name, one = next(iter(answering.items()))
    said, failed = _on_each(r, {name: one}, installed.flags, lambda _: (on_cpu(r),), FLAGS_S)
    if failed:
        fix = f"on that node: {r.engine.python} -c 'import slime.utils.arguments', and fix what it says"
        return Found(f"slime's parser cannot be asked: {failed[name]}", "it answers", fix)
    given = {word for word in arguments(r, 1, r.model.checkpoint) if word.startswith("--")}
    if unknown := sorted(given - {*said[name]}):
        return Found(f"unknown: {', '.join(unknown)}", f"{len(said[name])} flags", here.PINNED)
    return Found(f"all {len(given)} are known", f"{len(said[name])} flags")


@check("cluster.root", "checkpoints and data that one node writes and another does not see")
def shared_folder(r: Recipe, answering: dict[str, dict[str, Any]]) -> Found:
    folder = os.path.join(r.cluster.root, f".check-{secrets.token_hex(8)}")
    nonces = {name: secrets.token_hex(16) for name in answering}
    limit, fix = (
        "written and read by every node",
        "write cluster.root=FOLDER of one file system that every node can write to",
    )
    try:
        _, failed = _on_each(r, answering, node_report.write, lambda name: (folder, name, nonces[name]))
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
    """Both exchanges are measured together; where that fails, both say so."""
    if not seconds:
        return []
    speeds: dict[str, float] | Exception | None = None
    if known.taken is not None:
        a_node = network.CPU_RANKS if on_cpu(r) else r.cluster.gpus_per_node
        env = runtime_env(r)
        try:
            speeds = network.measured(known.taken, a_node, not on_cpu(r), env, seconds, start)
        except Exception as error:  # becomes a row, as any check's does
            speeds = error
    return [exchange(name)(r, speeds, name) for name in ("all-reduce", "all-to-all")]


def exchange(name: str) -> Callable[..., Check]:
    """The check of one of them."""
    return check(name, "a network at a fraction of its speed, which every step waits for")(_exchange)


def _exchange(r: Recipe, speeds: dict[str, float] | Exception, name: str) -> Found:
    """Bytes of a rank's message by the seconds it took, as what each GPU sends to other nodes: rings of an all-reduce cross from
    node to node once for all GPUs of a node."""
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
        return Found(f"{text}, by gloo; not on a CPU", judged=False)
    if r.cluster.nodes == 1 or r.cluster.network_gb_s is None:
        return Found(f"{text}; one node, or cluster.network_gb_s is not set", judged=False)
    between = bus / a_node if name == "all-reduce" else speed * (ranks - a_node) / ranks
    half = r.cluster.network_gb_s / 2
    return Found(
        f"{text}, {between:.3g} GB/s between nodes for each GPU",
        f"{half:g} GB/s, half of cluster.network_gb_s",
        ""
        if between >= half
        else f"write cluster.network_gb_s={between:.3g} where it is no faster; {network.fix(gpu=True)}",
    )


def runtime_env(r: Recipe) -> dict[str, Any]:
    """What a process of slime gets: in a job the cluster's own Python, on a Ray of this machine the one that slime will run by."""
    python = {} if in_ray_job() else {"py_executable": str(r.engine.python)}
    return {"env_vars": environment(r), **python}


def _on_each(
    r: Recipe,
    alive: dict[str, dict[str, Any]],
    function: Callable[..., Any],
    given: Callable[[str], tuple[Any, ...]],
    seconds: float | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls a function once on every node: what it returns by node, and why it does not where it does not within `seconds`, or
    `ANSWER_S`."""
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
