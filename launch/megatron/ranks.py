"""All ranks of a run as Ray actors. They are started, called, monitored and stopped together."""

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
from launch.cluster.image import packages
from launch.cluster.ray_errors import logs
from launch.megatron.rank_actor import Worker
from launch.megatron.rank_place import ALLOCATOR, Place
from launch.run.run_plan import Plan
from recipes.config import OptimizerState, Recipe, Recompute
from recipes.errors import LimiError, PreflightError, TrainError
from recipes.layout import world_size
from recipes.paths import REPO

DEATH_S = 5.0  # seconds within which Ray reports that a rank died


class Ranks:
    """A context in which the ranks run. However it is left, the actors are stopped, and so is Ray if it was started here."""

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
        if self._local and chosen and chosen not in (interfaces := sorted(os.listdir("/sys/class/net"))):
            raise PreflightError(
                f"cluster.interface={chosen} is not on this machine, which has {', '.join(interfaces)}",
                "write cluster.interface=NAME with one of these names, or cluster.interface=null",
            )
        env = {
            **({"GLOO_SOCKET_IFNAME": "lo"} if self._local else {}),
            **sockets(self.recipe),
            "PYTHONPATH": packages.python_path(self.recipe.cluster.root, str(REPO)),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            **self.recipe.cluster.env,
        }
        gpus = 1 if self.recipe.gpu.memory_mib else 0
        if gpus and (available := int(ray.cluster_resources().get("GPU", 0))) < world_size(self.recipe):
            raise too_few_gpus(self.recipe, available)
        if gpus:
            env = {"PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR, **env}
            if self.recipe.layout.tp > 1:  # Megatron's overlap of communication and computation relies on launch order
                env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **env}
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": env})
        self._workers = [actor.remote() for _ in range(world_size(self.recipe))]
        self._cleanup.callback(lambda: [ray.kill(w) for w in self._workers])

    @property
    def _local(self) -> bool:
        return self.recipe.cluster.nodes == 1

    def build(self, plan: Plan) -> None:
        """Build every rank with the base's weights. Replace ranks built earlier from another recipe with the same number of ranks."""
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
        """Call a method of `Rank` on all ranks. Return their results in rank order.

        Raise the project's errors as a rank raised them. Raise `TrainError` for any other error, if a rank died, or after
        `engine.timeout`.
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
                    f"raise engine.timeout, or read the ranks' logs in {logs()}",
                )
            self._check(calls, done[0], pending, what)
        return [ray.get(c) for c in calls]

    def _check(self, calls: list[Any], call: Any, pending: list[Any], what: str) -> None:
        """Raise the error of a finished call, if it failed. what: the name of the call, for the message."""
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
                    f"rank {rank} ran out of GPU memory in '{what}': {_last_line(error)}",
                    f"write {leaner(self.recipe)}",
                ) from error
            # The death of another rank breaks this rank's connection, often before Ray reports the death.
            if pending:
                others, _ = ray.wait(pending, num_returns=len(pending), timeout=DEATH_S)
                for dead in filter(_died, others):
                    raise TrainError(f"rank {calls.index(dead)} died in '{what}'") from error
            raise TrainError(f"rank {rank} failed in '{what}': {_last_line(error)}\n{error}") from error
        except RayError as error:
            raise TrainError(f"Ray failed in '{what}': {_last_line(error)}") from error


class Pool:
    """A context that builds ranks for one plan after another. It reuses their processes if the next plan needs as many, with the same
    environment."""

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
        """Build ranks for a plan and yield them. After an error their processes are stopped."""
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


def too_few_gpus(r: Recipe, available: int) -> PreflightError:
    """Return the error for missing GPUs. Without it, Ray would wait for them forever."""
    fix = f"write cluster.gpus_per_node={available}, or" if available else "write"
    return PreflightError(
        f"cluster={r.cluster.name} needs {world_size(r)} GPUs, but Ray finds {available} on this machine",
        f"{fix} cluster=local for a tiny model on the CPU",
    )


def leaner(r: Recipe) -> str:
    """Return the override that reduces GPU memory at the lowest cost in speed."""
    p = r.layout
    applies = {
        "layout.loss_chunk=4096": p.loss_chunk is None,
        "layout.recompute=linear": p.recompute in (Recompute.none, Recompute.selective),
        "layout.offload=true": p.recompute in (Recompute.linear, Recompute.full) and not p.offload,
        "layout.optimizer_state=offloaded": p.optimizer_state is OptimizerState.resident,
        "layout.recompute=full": p.recompute is Recompute.linear,
    }
    return next(
        (word for word, helps in applies.items() if helps), f"layout.tp={2 * p.tp}, or a smaller data.max_tokens"
    )


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
