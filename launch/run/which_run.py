"""Find the run that a command names: its recipe, its complete checkpoints from either engine, and its exports."""

from pathlib import Path

from launch.run.run_folder import RECORD
from launch.run.run_plan import BACK, read_plan
from launch.weights.hf_folder import INDEX
from launch.weights.shards import SINGLE
from recipes import json_file
from recipes.compose.recipe import from_yaml
from recipes.config import Recipe
from recipes.errors import CheckpointError, ConfigError
from recipes.paths import run_folder

_STEP_PREFIX = "hf-step"
TRACKER = "latest_checkpointed_iteration.txt"
# Overrides that may accompany a run's own recipe.
_ALLOWED = ("run", "step", "model", "cluster", "cluster.root", "model.checkpoint", "model.mtp")
# The same for a command that serves an export.
_ALLOWED_SERVING = (
    "run",
    "checkpoint",
    "model",
    "model.checkpoint",
    "cluster",
    "cluster.root",
    "gpu",
    "engine.python",
    "dry_run",
)


def own_recipe(asked: Recipe) -> Recipe:
    """Return the recipe that the run `asked.run` was trained with, with the folders of this command.

    Overrides may replace `model.checkpoint` and `model.mtp`. They may give `model` only to select the run's name. Raise
    `ConfigError` if the run does not exist or an override would have no effect.
    """
    run = run_folder(asked)
    if not (run / "config.yaml").is_file():
        there = sorted(p.parent.name for p in run.parent.glob("*/config.yaml"))
        raise ConfigError(f"there is no run '{run}'", f"write run=NAME, one of: {', '.join(there) or 'none is there'}")
    names = [word.partition("=")[0] for word in asked.overrides]
    if unused := [name for name in names if name not in _ALLOWED]:
        raise ConfigError(
            f"{', '.join(unused)}: the recipe is the run's own, '{run / 'config.yaml'}'",
            f"leave out all but {', '.join(_ALLOWED)}",
        )
    own = from_yaml(run / "config.yaml")
    own.run, own.cluster.root = asked.run, asked.cluster.root
    if "model.checkpoint" in names:
        own.model.checkpoint = asked.model.checkpoint
    if "model.mtp" in names:
        own.model.mtp = asked.model.mtp
    return own


def pick(run: Path, step: int | None) -> tuple[int, Path]:
    """Return (step, folder) of the checkpoint after `step` completed steps; None means the newest.

    Raise `CheckpointError` if it does not exist; the message lists the existing ones.
    """
    there = whole(run)
    if there and (step is None or step in there):
        newest = max(there) if step is None else step
        return newest, there[newest]
    named = f"; it has checkpoints of step {', '.join(map(str, sorted(there)))}: write step=N" if there else ""
    raise CheckpointError(f"'{run}' has no checkpoint{'' if step is None else f' of step {step}'}{named}")


def whole(run: Path) -> dict[int, Path]:
    """Return {completed steps: folder} of the complete checkpoints."""
    folder = run / "checkpoints"
    latest = latest_iteration(folder)
    recorded = [p.parent for p in folder.glob(f"step_*/{RECORD}")]
    slime = [p.parent for p in folder.glob("iter_*/.metadata")]
    found = {completed(path.name): path for path in (*recorded, *slime)}
    return {
        step: path
        for step, path in found.items()
        if step is not None and (step - 1 <= latest or (path / RECORD).is_file())
    }


def completed(name: str) -> int | None:
    """Return the completed steps of a checkpoint of this name, or None if the name is not an engine's.

    slime's names have the index of the last step, counted from 0.
    """
    engine, _, number = name.partition("_")
    return {"step": int(number), "iter": int(number) + 1}.get(engine) if number.isdecimal() else None


def latest_iteration(folder: Path) -> int:
    """Return the last iteration that Megatron wrote completely, or -1 if there is none.

    Megatron writes the tracker file after every rank has written its part. The result is also -1 while that write is in
    progress.
    """
    try:
        return int((folder / TRACKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return -1


def steps(run: Path) -> int:
    """Return the total number of steps of the run, from its plan."""
    plan = read_plan(run)
    with json_file.shape(run / "plan.json", BACK):
        return int(plan["steps"]["count"])


def target(run: Path, step: int) -> Path:
    """Return the export folder of a step: `hf/` for the last step of the run's plan, `hf-stepNNNNNN/` for earlier steps."""
    return run / ("hf" if step == steps(run) else f"{_STEP_PREFIX}{step:06}")


def step_of(export: Path) -> int | None:
    """Return the completed steps of an export that `target` named; None for the export of the last step."""
    return int(export.name.removeprefix(_STEP_PREFIX)) if export.name.startswith(_STEP_PREFIX) else None


def exported(asked: Recipe) -> tuple[Recipe, Path]:
    """Return (recipe, folder) of an export: the Hugging Face folder `checkpoint`, or the run's `hf/` if it is null.

    If the folder lies in a run, return that run's recipe. Overrides may then replace `model.checkpoint` (the base), the
    limits in `sanity`, and the machine: `cluster`, `gpu`, `engine.python`. Otherwise return the recipe of the overrides, which
    must name `model`. Raise `CheckpointError` if there is no such folder with weights. Raise `ConfigError` if an override
    would have no effect or the model is not named.
    """
    folder = run_folder(asked) / "hf" if asked.checkpoint is None else Path(asked.checkpoint).absolute()
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        missing.append(INDEX)
    if missing:
        there = sorted(str(p.parent) for p in run_folder(asked).parent.glob("*/hf*/config.json"))
        raise CheckpointError(
            f"'{folder}' has no {' and no '.join(missing)}",
            f"write checkpoint=FOLDER (make: CHECKPOINT=FOLDER) of an export, one of: "
            f"{', '.join(there) or 'none is there'}",
        )
    names = [word.partition("=")[0] for word in asked.overrides]
    if (folder.parent / "config.yaml").is_file():
        return _served(asked, folder.parent, names), folder
    if "model" not in names:
        raise ConfigError(
            f"'{folder}' belongs to no run, so its model is unknown", "write model=NAME (make: MODEL=NAME)"
        )
    return asked, folder


def _served(asked: Recipe, run: Path, names: list[str]) -> Recipe:
    """Return the recipe of the run in this folder, also if it was trained on another machine."""
    elsewhere = "cluster" in names or "gpu" in names
    groups = ("sanity.", *(("cluster.", "gpu.") if elsewhere else ()))
    if unused := [name for name in names if name not in _ALLOWED_SERVING and not name.startswith(groups)]:
        raise ConfigError(
            f"{', '.join(unused)}: the recipe is the run's own, '{run / 'config.yaml'}'; leave out all but "
            f"{', '.join(_ALLOWED_SERVING)} and sanity.NAME",
            "fields of cluster and gpu need cluster=NAME or gpu=NAME as well",
        )
    own = from_yaml(run / "config.yaml")
    if elsewhere:
        own.cluster, own.gpu = asked.cluster, asked.gpu
    own.run = run.name
    if run.parent.name == "runs":
        own.cluster.root = str(run.parent.parent)
    if "model.checkpoint" in names:
        own.model.checkpoint = asked.model.checkpoint
    if "engine.python" in names:
        own.engine.python = asked.engine.python
    for name in names:
        group, _, key = name.partition(".")
        if group == "sanity" and key:
            setattr(own.sanity, key, getattr(asked.sanity, key))
    return own
