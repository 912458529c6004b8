"""What is submitted to Ray: `runs/NAME/job.json` holds the entry point, its argument list and the environment of every process."""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.cluster.connection import sockets
from launch.slime.arguments import arguments, on_cpu
from recipes.compose.recipe import to_yaml
from recipes.config import Recipe
from recipes.layout import world_size
from recipes.paths import REPO, run_folder

RUN = "LIMI_RUN"  # names the run folder to the project's functions inside slime
# What every process gets, by the job's runtime environment; `cluster.env` goes over them.
DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it where tensor or context parallelism overlaps communication
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # sequences of unlike length leave holes otherwise
    "NCCL_NVLS_ENABLE": "1",  # sums in the NVLink switch, where there is one
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def environment(r: Recipe) -> dict[str, str]:
    """Of every process of the job. slime itself adds, on its trainers, NCCL_CUMEM_ENABLE=0 and
    NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 (`actor_group.py` at 624b824)."""
    own = {
        "PYTHONPATH": ":".join([str(REPO), str(r.engine.megatron_root), str(r.engine.slime_root)]),
        RUN: str(run_folder(r)),
        "TENSORBOARD_DIR": str(run_folder(r) / "tensorboard" / "slime"),
    }
    cores = {"OMP_NUM_THREADS": "1"} if on_cpu(r) else {}
    return {**own, **DEFAULTS, **cores, **sockets(r), **r.cluster.env}


def own_resources(r: Recipe) -> dict[str, int]:
    """Of a Ray of this machine alone: slime places a core beside every GPU and some more, however many there are, and a core in a
    GPU's place on a CPU."""
    ranks = world_size(r)
    return {"num_cpus": max(os.cpu_count() or 1, ranks + 4), **({"num_gpus": ranks} if on_cpu(r) else {})}


def job(r: Recipe, num_steps: int, load: str, save: bool) -> dict[str, Any]:
    """entrypoint: the script that Ray runs. argv: what follows it. env_vars: of every process."""
    return {
        "entrypoint": f"{r.engine.slime_root}/train_async.py",
        "argv": arguments(r, num_steps, load, save=save),
        "env_vars": environment(r),
    }


def write(r: Recipe, num_steps: int, load: str, *, save: bool = True) -> Path:
    """Writes `job.json` and the resolved recipe beside it; returns its path. load, save: as `arguments` takes them."""
    root = run_folder(r)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "config.yaml", to_yaml(r))
    write_text(root / "job.json", json.dumps(job(r, num_steps, load, save), indent=2) + "\n")
    return root / "job.json"
