"""Measurement of the network between a cluster's ranks: torch.distributed's all-reduce and all-to-all over all ranks."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.cluster.rendezvous import open_store
from recipes.errors import PreflightError

MEGABYTE = 2**20
SIZES = {
    True: [4**k * MEGABYTE for k in range(6)],
    False: [4**k * MEGABYTE for k in range(4)],
}  # bytes, by whether on GPUs
CPU_RANKS = 2  # ranks per node without GPUs
START_S = 120.0  # longest wait for processes, imports and process group, in addition to the messages


class Peer:
    """The Ray actor of one rank. It imports torch only in its methods."""

    def __init__(self) -> None:
        self._store: Any = None

    def open_store(self, host: str) -> int:
        self._store, port = open_store(host)
        return port

    def measure(self, rank: int, world: int, where: tuple[str, int], gpu: bool, seconds: float) -> dict[str, float]:
        """Return the speed of each exchange: bytes of a rank's message per second of the slowest rank, best of growing sizes.

        where: host and port of the store. seconds: time for both exchanges together.
        """
        import torch
        import torch.distributed as dist

        store = self._store or dist.TCPStore(*where, is_master=False)  # type: ignore[attr-defined]
        if gpu:
            torch.cuda.set_device(0)  # the GPU that Ray assigned to this process
        backend, timeout = "nccl" if gpu else "gloo", timedelta(seconds=START_S)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

        def all_to_all(message: Any) -> None:
            dist.all_to_all_single(torch.empty_like(message), message)

        return {
            "all-reduce": self._best(dist.all_reduce, world, gpu, seconds / 2),
            "all-to-all": self._best(all_to_all, world, gpu, seconds / 2),
        }

    def _best(self, exchange: Callable[[Any], Any], world: int, gpu: bool, seconds: float) -> float:
        import torch
        import torch.distributed as dist

        device = "cuda" if gpu else "cpu"
        started, best, repeats = time.perf_counter(), 0.0, 3
        for size in SIZES[gpu]:
            message = torch.zeros(size // 4 // world * world, device=device)

            def run(times: int, message: Any = message) -> float:
                begun = time.perf_counter()
                for _ in range(times):
                    exchange(message)
                if gpu:
                    torch.cuda.synchronize()
                return time.perf_counter() - begun

            run(1)
            took = run(repeats) / repeats
            slowest = torch.tensor([took, time.perf_counter() - started], device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # all ranks stop at the same size
            took, passed = slowest.tolist()
            best = max(best, size / took)
            if passed + 4 * (repeats + 1) * took > seconds:
                break
        return best


def measured(
    nodes: list[dict[str, Any]], per_node: int, gpu: bool, env: dict[str, Any], seconds: float, start: float
) -> dict[str, float]:
    """Return bytes per second by exchange, over `per_node` ranks on each of these Ray nodes.

    env: Ray's runtime environment. seconds: time for the messages. start: longest wait for the ranks' processes, which are gone
    when it returns. Raise `PreflightError` if a rank fails or does not answer in time.
    """
    actor: Any = ray.remote(Peer)
    options = {"num_cpus": 0, "num_gpus": int(gpu), "max_restarts": 0, "runtime_env": env}
    places = [NodeAffinitySchedulingStrategy(n["NodeID"], soft=False) for n in nodes for _ in range(per_node)]
    peers = [actor.options(scheduling_strategy=place, **options).remote() for place in places]
    deadline = time.monotonic() + start + seconds
    try:
        host = nodes[0]["NodeManagerAddress"]
        port = _answers([peers[0].open_store.remote(host)], deadline, gpu)[0]
        calls = [p.measure.remote(i, len(peers), (host, port), gpu, seconds) for i, p in enumerate(peers)]
        return _answers(calls, deadline, gpu)[0]
    finally:
        for peer in peers:
            ray.kill(peer)


def _answers(calls: list[Any], deadline: float, gpu: bool) -> list[Any]:
    pending = list(calls)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        try:
            if done:
                ray.get(done[0])
                continue
        except RayError as error:
            raise PreflightError(
                f"rank {calls.index(done[0])}: {str(error).strip().splitlines()[-1]}", fix(gpu)
            ) from error
        stuck = ", ".join(str(i) for i, c in enumerate(calls) if c in pending)
        raise PreflightError(f"rank {stuck} did not answer in time", fix(gpu))
    return ray.get(calls)


def fix(gpu: bool) -> str:
    """Return what to write if ranks do not reach one another, or not fast enough."""
    if not gpu:
        return "write cluster.interface=NAME of the network interface between the nodes"
    return (
        "write cluster.interface=NAME of the network interface between the nodes, or cluster.env.NCCL_DEBUG=INFO to see what "
        "NCCL says"
    )
