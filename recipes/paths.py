"""Where things lie: the checkout, its configuration, and what a run leaves."""

import os
from pathlib import Path

from recipes.config import Recipe

REPO = Path(__file__).resolve().parents[1]
CONF = REPO / "hydra_conf"


def in_ray_job() -> bool:
    """Whether this process is the entry point of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def local_root() -> str:
    """Return the default of `cluster.root` on one machine: the checkout, or `~/limi` in a Ray job, whose checkout is a copy that
    Ray removes."""
    return str(Path.home() / "limi") if in_ray_job() else str(REPO)


def run_folder(r: Recipe) -> Path:
    """Return `runs/NAME/` under `cluster.root`: everything one run leaves behind."""
    return Path(r.cluster.root) / "runs" / r.run
