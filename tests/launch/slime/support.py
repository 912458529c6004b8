"""The real slime and Megatron-LM at the pinned commits, where the environment names them."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launch.run.run_folder import RunFolder
from launch.slime.arguments import arguments
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.plan import planner
from recipes.plan.search import Sequences
from recipes.schedule import lengths
from tests.guard import wants
from tests.launch.support import recipe_of


def pinned() -> tuple[str, dict[str, str]]:
    """A Python that has what slime imports (numpy 1.26), and an environment in which both checkouts are found."""
    wants("contract", "needs slime and Megatron-LM")
    names = ("SLIME_PYTHON", "SLIME_ROOT", "MEGATRON_ROOT", "LIMI_REFERENCE")
    if missing := [name for name in names if name not in os.environ]:
        pytest.skip(f"{', '.join(missing)} not set")
    python, slime, megatron, reference = (os.environ[name] for name in names)
    return python, {**os.environ, "PYTHONPATH": f"{slime}:{megatron}:{reference}/slime_cpu"}


def on_cpu() -> None:
    """Skips where the real slime cannot run on this machine."""
    wants("contract", "needs slime and Megatron-LM")
    names = ("SLIME_PYTHON", "SLIME_ROOT", "MEGATRON_ROOT")
    if missing := [name for name in names if name not in os.environ]:
        pytest.skip(f"{', '.join(missing)} not set")


def slime_at(commit: str, folder: Path) -> Path:
    """A clone of slime at the commit, in the folder."""
    there = os.environ["SLIME_ROOT"]
    if subprocess.run(["git", "-C", there, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True).returncode:
        pytest.skip(f"SLIME_ROOT has no commit {commit[:7]}: git fetch --unshallow")
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", there, str(folder / "slime")], check=True)
    subprocess.run(["git", "-C", str(folder / "slime"), "checkout", "--quiet", commit], check=True)
    return folder / "slime"


@cache
def planned(*words: str) -> tuple[Recipe, int]:
    """The recipe with its layout settled on LIMI's published lengths, and its steps."""
    recipe = compose_recipe(list(words))
    counted = [n for n in lengths.quantiles() if n <= recipe.data.max_tokens]
    made = planner.make_plan(recipe, Sequences(range(len(counted)), counted, "as LIMI's were published"))
    return made.recipe, made.schedule.num_steps


def rendered(*words: str) -> list[str]:
    recipe, steps = planned(*words)
    return arguments(recipe, steps, recipe.model.checkpoint)


def checked(argv: list[str], config: Path, *words: str) -> dict[str, Any]:
    """What slime's and Megatron's own validation says of a list, with the model of `config`, a folder with a config.json."""
    python, env = pinned()
    script = f"{env['LIMI_REFERENCE']}/slime_cpu/check_args.py"
    done = subprocess.run(
        [python, script, str(config), "--model-config", "--groups", *words],
        input=json.dumps(argv),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def in_megatron(argv: list[str], config: Path) -> dict[str, Any]:
    """`megatron_config.py` on a list, with the model of `config`."""
    python, env = pinned()
    place = argv.index("--hf-checkpoint") + 1
    done = subprocess.run(
        [python, str(Path(__file__).parent / "megatron_config.py")],
        input=json.dumps([*argv[:place], str(config), *argv[place + 1 :]]),
        capture_output=True,
        text=True,
        env={**env, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def begun(tmp_path, root, *words: str) -> RunFolder:
    """A run of slime under the folder, not yet begun."""
    recipe, data, heldout = recipe_of(root, "engine=slime", f"cluster.root={tmp_path}", *words)
    return RunFolder(recipe, data, heldout)
