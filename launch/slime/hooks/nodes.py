"""A watch on the cluster's nodes, in slime's driver. slime itself waits for GPUs without end, and says so only in its log.

While nodes are missing, `SHORTAGE` in the run folder says how many. After `engine.node_timeout` the driver ends.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.slime import failure
from recipes.config import Recipe
from recipes.errors import NodeLostError

SHORTAGE = "nodes.txt"  # empty while every node is there
_POLL_S = 2.0


def start(run: Path, recipe: Recipe) -> None:
    """Start the watch in a thread of this process, which is connected to Ray."""
    import ray

    threading.Thread(target=watch, args=(run, recipe, ray.nodes), daemon=True).start()


def watch(
    run: Path,
    recipe: Recipe,
    nodes: Callable[[], Sequence[dict[str, Any]]],
    end: Callable[[int], object] = os._exit,
    poll_s: float = _POLL_S,
) -> None:
    """Compare the cluster's nodes with the recipe's, for ever. Call `end` once some are missing for `engine.node_timeout` seconds."""
    said, since = "", 0.0
    write_text(run / SHORTAGE, "")
    while True:
        if (missing := shortage(recipe, nodes())) != said:
            since = since if said and missing else time.monotonic()
            write_text(run / SHORTAGE, missing)
            said = missing
        limit = recipe.engine.node_timeout
        if missing and limit is not None and time.monotonic() - since > limit:
            failure.leave(run, lost(recipe, missing))
            end(1)
            return
        time.sleep(poll_s)


def shortage(recipe: Recipe, nodes: Sequence[dict[str, Any]]) -> str:
    """Return which nodes are missing, or an empty text. nodes: as `ray.nodes()` returns them."""
    wanted, gpus = recipe.cluster.nodes, recipe.cluster.gpus_per_node
    able = [n["NodeManagerAddress"] for n in nodes if n["Alive"] and n["Resources"].get("GPU", 0) >= gpus]
    if len(able) >= wanted:
        return ""
    gone = ", ".join(sorted({n["NodeManagerAddress"] for n in nodes if not n["Alive"]} - {*able}))
    return f"{len(able)} of {wanted} nodes with {gpus} GPUs are in the cluster{f'; lost: {gone}' if gone else ''}"


def lost(recipe: Recipe, missing: str) -> NodeLostError:
    return NodeLostError(
        f"{missing}, for engine.node_timeout={recipe.engine.node_timeout} s",
        "start Ray there again (ray start --address=HEAD:6379), or write cluster.nodes=N with the nodes that are left if the layout "
        "allows it (`make plan` says); the same command goes on from the last checkpoint",
    )
