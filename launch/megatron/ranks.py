"""All ranks of a run as Ray actors: started, called together, watched and ended together."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from launch.cluster.connection import connected, sockets
from launch.cluster.ray_errors import logs
from launch.megatron.rank_actor import Worker
from launch.megatron.rank_place import Place
from launch.run.run_plan import Plan
from recipes.config import OptimizerState, Recipe, Recompute
from recipes.errors import LimiError, PreflightError, TrainError
from recipes.layout import world_size
from recipes.paths import REPO

DEATH_S = 5.0  # within which Ray reports a rank's death


class Ranks:
    """A context in which the ranks live. On leaving, by whatever way, the actors are gone, and Ray too where it was
    started here."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._cleanup = ExitStack()
        self._workers: list[Any] = []

    def __enter__(self) -> "Ranks":
        try:
            self._cleanup.enter_context(connected(num_cpus=world_size(self.recipe)))
            self._start_workers()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _start_workers(self) -> None:
        chosen = self.recipe.cluster.interface
        if self._local and chosen and chosen not in (found := sorted(os.listdir("/sys/class/net"))):
            raise PreflightError(
                f"cluster.interface={chosen} is not on this machine, which has {', '.join(found)}",
                "write cluster.interface=NAME, one of these, or cluster.interface=null",
            )
        env = {
            **({"GLOO_SOCKET_IFNAME": "lo"} if self._local else {}),
            **sockets(self.recipe),
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            **self.recipe.cluster.env,
        }
        gpus = 1 if self.recipe.gpu.memory_mib else 0
        if gpus and (there := int(ray.cluster_resources().get("GPU", 0))) < world_size(self.recipe):
            raise too_few_gpus(self.recipe, there)
        if gpus:
            # Sequences of unlike length leave holes otherwise.
            env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **env}
            if self.recipe.layout.tp > 1:  # Megatron overlaps its messages with what was launched before them
                env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **env}
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": env})
        self._workers = [actor.remote() for _ in range(world_size(self.recipe))]
        self._cleanup.callback(lambda: [ray.kill(w) for w in self._workers])

    @property
    def _local(self) -> bool:
        return self.recipe.cluster.nodes == 1

    def build(self, plan: Plan) -> None:
        """Builds every rank with the base's weights; those built before, of another recipe for as many ranks, are left."""
        self.recipe = plan.recipe
        train = str(plan.data.folder), plan.schedule
        heldout = (str(plan.heldout.folder), plan.heldout_schedule) if plan.heldout else None
        host = "127.0.0.1" if self._local else ray.util.get_node_ip_address()
        port = self._gather([self._workers[0].open_store.remote(host)], "start")[0]
        per_node = self.recipe.cluster.gpus_per_node
        places = [Place(i, i % per_node, host, port) for i in range(len(self._workers))]
        self._gather(
            [w.build.remote(self.recipe, p, train, heldout) for w, p in zip(self._workers, places, strict=True)],
            "start",
        )

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of `Rank` on all ranks; their results in rank order.

        Raises what a rank raised, or `TrainError` where one died or `engine.timeout` passed.
        """
        return self._gather([w.call.remote(method, *arguments) for w in self._workers], method)

    def _gather(self, calls: list[Any], what: str) -> list[Any]:
        deadline = time.monotonic() + self.recipe.engine.timeout
        pending = list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                stuck = [i for i, c in enumerate(calls) if c in pending]
                raise TrainError(
                    f"rank {', '.join(map(str, stuck))} did not finish '{what}' within engine.timeout="
                    f"{self.recipe.engine.timeout} s",
                    f"raise it, or look at the ranks' logs in {logs()}",
                )
            self._check(calls, done[0], pending, what)
        return [ray.get(c) for c in calls]

    def _check(self, calls: list[Any], call: Any, pending: list[Any], what: str) -> None:
        """Raises what a finished call raised."""
        rank = calls.index(call)
        try:
            ray.get(call)
        except RayActorError as error:
            raise TrainError(f"rank {rank} died in '{what}'") from error
        except RayTaskError as error:
            if isinstance(error.cause, LimiError):
                raise error.cause from None
            if type(error.cause).__name__ == "OutOfMemoryError":  # torch's
                raise TrainError(
                    f"rank {rank} ran out of the GPU's memory in '{what}': {_last_line(error)}",
                    f"write {leaner(self.recipe)}",
                ) from error
            # Another rank's death shows here as a broken connection, and often sooner than Ray reports it.
            if pending:
                others, _ = ray.wait(pending, num_returns=len(pending), timeout=DEATH_S)
                for dead in filter(_died, others):
                    raise TrainError(f"rank {calls.index(dead)} died in '{what}'") from error
            raise TrainError(f"rank {rank} failed in '{what}': {_last_line(error)}\n{error}") from error
        except RayError as error:
            raise TrainError(f"Ray ended in '{what}': {_last_line(error)}") from error


class Pool:
    """Ranks one recipe after the other, whose processes stay where the next takes as many. A context."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._key: Any = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.__exit__(None, None, None)
        self._ranks = self._key = None

    @contextlib.contextmanager
    def ranks(self, plan: Plan) -> Iterator[Ranks]:
        """Ranks built for a plan. After an error their processes end."""
        key = plan.world_size, plan.recipe.cluster.env, Worker
        try:
            if key != self._key:
                self.close()
                self._ranks, self._key = Ranks(plan.recipe).__enter__(), key
            assert self._ranks is not None
            self._ranks.build(plan)
            yield self._ranks
        except BaseException:
            self.close()
            raise


def too_few_gpus(r: Recipe, there: int) -> PreflightError:
    """Ray would wait for those that are missing."""
    fix = f"write cluster.gpus_per_node={there}, or" if there else "write"
    return PreflightError(
        f"cluster={r.cluster.name} is {world_size(r)} GPUs, and Ray finds {there} on this machine",
        f"{fix} cluster=local for a tiny model on the CPU",
    )


def leaner(r: Recipe) -> str:
    """What to type for less memory on the GPU, the cheapest first."""
    p = r.layout
    words = {
        "layout.loss_chunk=4096": p.loss_chunk is None,
        "layout.recompute=linear": p.recompute in (Recompute.none, Recompute.selective),
        "layout.offload=true": p.recompute in (Recompute.linear, Recompute.full) and not p.offload,
        "layout.optimizer_state=offloaded": p.optimizer_state is OptimizerState.resident,
        "layout.recompute=full": p.recompute is Recompute.linear,
    }
    return next((word for word, helps in words.items() if helps), f"layout.tp={2 * p.tp}, or a smaller data.max_tokens")


def _died(call: Any) -> bool:
    try:
        ray.get(call)
    except RayActorError:
        return True
    except RayError:
        return False
    return False


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
