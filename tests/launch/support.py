"""What tests of training share: recipes with their data, and steps on real ranks."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from data_prep.dataset import Dataset, prepare
from launch.megatron.ranks import Ranks
from launch.model import tiny
from launch.plan import Plan
from recipes.compose import compose_recipe
from recipes.config import Recipe
from tests.conftest import REPO


def recipe_of(root: Path, *words: str) -> tuple[Recipe, Dataset, Dataset]:
    """The recipe with its tiny base made and its two data sets packed under `root`."""
    recipe = compose_recipe([f"cluster.root={root}", *words])
    tiny.make(recipe)
    return recipe, prepare(recipe, recipe.data.path), prepare(recipe, str(recipe.data.heldout))


@contextlib.contextmanager
def ranks_of(root: Path, *words: str) -> Iterator[tuple[Plan, Ranks]]:
    """Real ranks with the recipe's model loaded."""
    plan = Plan(*recipe_of(root, *words))
    with Ranks(plan.recipe) as ranks:
        ranks.build((str(plan.data.folder), str(plan.heldout.folder)), (plan.schedule, plan.heldout_schedule))
        yield plan, ranks


def limi(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line, as a user types it."""
    return subprocess.run(
        [sys.executable, "launch/limi.py", *words], cwd=REPO, capture_output=True, text=True, timeout=600, **kwargs
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without their timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def alive(processes: list[psutil.Process], patience: float = 15.0) -> list[psutil.Process]:
    """Those that still run after `patience` seconds."""
    return psutil.wait_procs(processes, timeout=patience)[1]
