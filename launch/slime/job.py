"""What is submitted to Ray: `runs/NAME/job.json` holds the entry point, its argument list and the environment of every process."""

import json
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from launch.slime.arguments import arguments
from recipes.compose import REPO, run_folder, to_yaml
from recipes.config import Recipe

RUN = "LIMI_RUN"  # names the run folder to the project's functions inside slime
# What every process gets, by the job's runtime environment; `cluster.env` goes over them.
DEFAULTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it where tensor or context parallelism overlaps communication
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # sequences of unlike length leave holes otherwise
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def job(r: Recipe, num_steps: int, load: str, save: bool) -> dict[str, Any]:
    """entrypoint: the script that Ray runs. argv: what follows it. env_vars: of every process."""
    paths = (str(REPO), r.engine.megatron_root, r.engine.slime_root)
    return {
        "entrypoint": f"{r.engine.slime_root}/train_async.py",
        "argv": arguments(r, num_steps, load, save=save),
        "env_vars": {
            "PYTHONPATH": ":".join(p for p in paths if p),
            RUN: str(run_folder(r)),
            "TENSORBOARD_DIR": str(run_folder(r) / "tensorboard" / "slime"),
            **DEFAULTS,
            **r.cluster.env,
        },
    }


def write(r: Recipe, num_steps: int, load: str, *, save: bool = True) -> Path:
    """Writes `job.json` and the resolved recipe beside it; returns its path. load, save: as `arguments` takes them."""
    root = run_folder(r)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "config.yaml", to_yaml(r))
    write_text(root / "job.json", json.dumps(job(r, num_steps, load, save), indent=2) + "\n")
    return root / "job.json"
