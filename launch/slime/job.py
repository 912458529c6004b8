"""The job that is submitted to Ray. `runs/NAME/job.json` holds its entry point, its arguments and the environment of all processes."""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.cluster.connection import sockets
from launch.cluster.image import packages
from launch.slime.arguments import arguments, on_cpu
from recipes.compose.recipe import to_yaml
from recipes.config import Recipe
from recipes.layout import world_size
from recipes.paths import REPO, run_folder

RUN = "LIMI_RUN"  # the variable that tells the project's functions inside slime the run folder
# Variables of every process, set by the job's runtime environment; `cluster.env` overrides them.
DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it if tensor or context parallelism overlaps communication
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # without it, sequences of different lengths fragment the memory
    "NCCL_NVLS_ENABLE": "1",  # reduce in the NVLink switch, if there is one
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def environment(r: Recipe) -> dict[str, str]:
    """Return the environment of every process of the job. On its trainers, slime adds NCCL_CUMEM_ENABLE=0 and
    NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 (`actor_group.py` at 624b824)."""
    own = {
        "PYTHONPATH": packages.python_path(
            r.cluster.root, str(REPO), str(r.engine.megatron_root), str(r.engine.slime_root)
        ),
        RUN: str(run_folder(r)),
        "TENSORBOARD_DIR": str(run_folder(r) / "tensorboard" / "slime"),
    }
    cores = {"OMP_NUM_THREADS": "1"} if on_cpu(r) else {}
    return {**own, **DEFAULTS, **cores, **sockets(r), **r.cluster.env}


def own_resources(r: Recipe) -> dict[str, int]:
    """Return the resources for a Ray that runs on this machine only.

    slime reserves one core for each GPU and a few more, so the number of cores is raised if the machine has fewer. On a CPU, each
    rank counts as one GPU.
    """
    ranks = world_size(r)
    return {"num_cpus": max(os.cpu_count() or 1, ranks + 4), **({"num_gpus": ranks} if on_cpu(r) else {})}


def job(r: Recipe, num_steps: int, load: str, save: bool) -> dict[str, Any]:
    """Return the content of `job.json`. entrypoint: the script that Ray runs. argv: its arguments. env_vars: the environment of every
    process."""
    return {
        "entrypoint": f"{r.engine.slime_root}/train_async.py",
        "argv": arguments(r, num_steps, load, save=save),
        "env_vars": environment(r),
    }


def write_job(r: Recipe, num_steps: int, load: str, *, save: bool = True) -> Path:
    """Write `job.json`, and the resolved recipe next to it. Return the path of `job.json`. load, save: see `arguments`."""
    root = run_folder(r)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "config.yaml", to_yaml(r))
    write_text(root / "job.json", json.dumps(job(r, num_steps, load, save), indent=2) + "\n")
    return root / "job.json"
