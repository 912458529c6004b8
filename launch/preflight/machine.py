"""Check whether a run can start on this machine or on this job's Ray cluster, before any file is read, written or fetched."""

import ctypes
import importlib.util
import os

from launch.preflight.checklist import Found, check
from recipes.compose import commands
from recipes.compose.recipe import compose_recipe
from recipes.config import AttentionKernel, EngineName, Recipe
from recipes.dimensions import parameters
from recipes.layout import faults, world_size
from recipes.paths import in_ray_job
from recipes.plan.memory import Load, gpu_memory, memory_limit, optimizer_bytes
from recipes.plan.partition import element_size
from recipes.plan.shown.plan_words import gigabytes

_HERE = "here, model=qwen3-tiny trains on the CPU"


@check("machine", "a download and hours of work for a run that cannot start here")
def machine(r: Recipe) -> Found:
    needed, ranks = least_memory(r), world_size(r)
    there = memory_limit(r) * (ranks if r.gpu.memory_mib else r.cluster.gpus_per_node)
    where = f"{gigabytes(there)} GB of {f'{ranks} x {r.gpu.name}' if r.gpu.memory_mib else 'this machine'}"
    text = f"{r.model.name} needs at least {gigabytes(needed)} GB on {ranks} rank{'s' * (ranks > 1)} ({_counted(r)})"
    if needed > there:
        return Found(text, where, _larger(r))
    return Found(text, where) if r.gpu.memory_mib is None else _gpus(r)


def gpus_here() -> int:
    """Return the number of GPUs of this machine, as its driver counts them, limited by `CUDA_VISIBLE_DEVICES`.

    It does not depend on how torch was built.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in (shown or "").split(",") if name.strip() not in ("", "-1")]
    return count.value if shown is None else min(count.value, len(named))


def _gpus(r: Recipe) -> Found:
    wanted, nodes = world_size(r), r.cluster.nodes
    limit = f"{wanted} of cluster={r.cluster.name}, on {nodes} {'nodes' if nodes > 1 else 'node'}"
    if in_ray_job():
        there = _gpus_of_cluster()
        fix = "write a smaller cluster.nodes, or add nodes to it: ray start --address=HEAD:6379, on each"
        return Found(f"{there} GPUs in the Ray cluster of this job", limit, "" if there >= wanted else fix)
    there = gpus_here()
    if nodes > 1:
        return Found(f"{there} GPUs on this machine, but cluster.address is not set", limit, _elsewhere(r))
    if there < wanted:
        fewer = f"write cluster.gpus_per_node={there}, or " if there else ""
        return Found(f"{there} GPUs on this machine", limit, fewer + _elsewhere(r))
    if r.engine.name is EngineName.megatron and lacks_kernel(r.gpu.attention):
        return Found(
            f"{there} GPUs on this machine, but no package flash-attn-4, which gpu.attention=flash4 needs",
            limit,
            "write gpu.attention=cudnn, or install it: `make setup LOCK=constraints-gpu.txt` does",
        )
    return Found(f"{there} GPUs on this machine", limit)


def lacks_kernel(kernel: AttentionKernel) -> bool:
    """Return whether the kernel needs a package that this Python lacks."""
    return kernel is AttentionKernel.flash4 and importlib.util.find_spec("flash_attn") is None


def _gpus_of_cluster() -> int:
    import ray

    from launch.cluster.connection import connected

    with connected():
        return int(ray.cluster_resources().get("GPU", 0))


def least_memory(r: Recipe) -> float:
    """Return the bytes of weights, gradients and Adam's moments on all ranks together, without activations.

    If the layout is not settled or not legal, every tensor counts once, and on GPUs the moments are left out, because they may be
    on the host.
    """
    if _is_open(r):
        moments = 0 if r.gpu.memory_mib else optimizer_bytes(r)
        return parameters(r.model).total * (element_size(r) + 4 + moments)
    ranks_of_stage = world_size(r) // r.layout.pp
    stages = gpu_memory(r, Load([[1]]))
    return ranks_of_stage * sum(s.weights + s.gradients + s.optimizer + s.runtime for s in stages)


def _is_open(r: Recipe) -> bool:
    return r.layout.search or next(faults(r), None) is not None


def _counted(r: Recipe) -> str:
    return "weights and gradients" if r.gpu.memory_mib and _is_open(r) else "weights, gradients and Adam's moments"


def _larger(r: Recipe) -> str:
    """Return the fix for a model that is too large for the recipe's cluster: the cluster of the model's own file."""
    usual = compose_recipe([w for w in r.overrides if w.startswith("model=")])
    if usual.gpu.memory_mib is None:
        return f"write a smaller model; {_HERE}"
    if usual.cluster.name == r.cluster.name:
        return f"write a larger cluster.nodes, or a smaller model; {_HERE}"
    return _elsewhere(r, usual.cluster.name)


def _elsewhere(r: Recipe, cluster: str | None = None) -> str:
    """Return where the run could start, and the command that shows what it needs. cluster: another one than the recipe's."""
    named = f"cluster={cluster} " if cluster else ""
    return (
        f"write {named}cluster.address=http://HEAD:8265 of a Ray cluster with these GPUs; `{commands.of_words('plan', r, cluster)}` "
        f"shows what it takes; {_HERE}"
    )
