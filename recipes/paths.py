"""Folders of the project: the checkout, its configuration and a run's folder."""

import os
from pathlib import Path

from recipes.config import Recipe

REPO = Path(__file__).resolve().parents[1]
CONF = REPO / "hydra_conf"


def in_ray_job() -> bool:
    """Return whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def local_root() -> str:
    """Return the default of `cluster.root` on one machine: the checkout, or `~/limi` in a Ray job.

    The checkout of a Ray job is a copy that Ray removes.
    """
    return str(Path.home() / "limi") if in_ray_job() else str(REPO)


def run_folder(r: Recipe) -> Path:
    """Return `runs/NAME/` under `cluster.root`, the folder with all files of a run."""
    return Path(r.cluster.root) / "runs" / r.run
