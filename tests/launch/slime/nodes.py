"""A Ray cluster of several nodes on this machine, in a process of its own. As JSON on standard input comes: `nodes`, the CPUs and
GPUs of each; `cases`, each with the `words` of a recipe, the `pins` that the preflight takes for right, and its times; `apart`, a
further case, for which a node joins that has a file system of its own in the place of `folder`. Out come, as JSON, the rows of each
case, its seconds, and what of it still ran afterwards."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time

os.environ |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

import psutil
import ray
from ray.cluster_utils import Cluster

from launch.preflight import cluster_checks, node_checks
from recipes.compose.recipe import compose_recipe

OURS = ("Peer", "report", "write", "unread", "remove")  # actors and tasks of the preflight


def running() -> list[str]:
    titles = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles.append(process.cmdline()[0].strip() if process.cmdline() else "")
    return [title for title in titles if title.startswith(tuple(f"ray::{name}" for name in OURS))]


def apart(folder: str, address: str) -> subprocess.Popen[bytes]:
    """A node with a file system of its own in the place of this folder."""
    start = f"{sys.executable} -m ray.scripts.scripts start --address={address} --num-cpus=2 --num-gpus=2 --block"
    script = f"mount -t tmpfs tmpfs {folder} && exec {start}"
    return subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=sys.stderr, start_new_session=True)


def wait_for(gpus: int) -> None:
    while ray.available_resources().get("GPU", 0) < gpus:
        time.sleep(0.1)


def rows_of(case: dict) -> dict:
    for name, value in case.get("pins", {}).items():
        setattr(node_checks, name, value)
    started = time.monotonic()
    rows = cluster_checks.cluster_rows(compose_recipe(case["words"]), *case.get("times", [2.0]))
    seconds = time.monotonic() - started
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)
    return {"rows": {r.name: {**vars(r), "red": r.failed} for r in rows}, "left": running(), "seconds": seconds}


os.environ |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
asked = json.load(sys.stdin)
cluster, other = Cluster(), None
try:
    for i, size in enumerate(asked["nodes"]):
        cluster.add_node(**size, object_store_memory=100 << 20, **({} if i else {"include_dashboard": False}))
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    gpus = sum(size["num_gpus"] for size in asked["nodes"])
    wait_for(gpus)
    out = [rows_of(case) for case in asked["cases"]]
    if "apart" in asked:
        other = apart(asked["apart"]["folder"], cluster.address)
        wait_for(gpus + 2)
        out.append(rows_of(asked["apart"]))
    json.dump(out, sys.stdout)
finally:
    ray.shutdown()
    if other is not None:
        started = [psutil.Process(other.pid), *psutil.Process(other.pid).children(recursive=True)]
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(started, timeout=10)
    cluster.shutdown()
