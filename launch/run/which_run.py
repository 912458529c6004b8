"""The run that a command names: its own recipe, its whole checkpoints, whichever engine wrote them, and its exports."""

from pathlib import Path

from launch.run.run_folder import RECORD
from launch.run.run_plan import BACK, read_plan
from recipes import json_file
from recipes.compose.recipe import from_yaml
from recipes.config import Recipe
from recipes.errors import CheckpointError, ConfigError
from recipes.paths import run_folder

_EARLIER = "hf-step"
TRACKER = "latest_checkpointed_iteration.txt"
_FROM_HERE = ("run", "step", "model", "cluster", "cluster.root", "model.checkpoint", "model.mtp")
# As above, of a command that serves an export.
_SERVING = (
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
    """The recipe that the run `asked.run` was trained with, in the folders of this command.

    The words may name `model.checkpoint` and `model.mtp` anew, and `model` only for the run's name. Raises `ConfigError` where
    there is no such run, or a word would have no effect.
    """
    run = run_folder(asked)
    if not (run / "config.yaml").is_file():
        there = sorted(p.parent.name for p in run.parent.glob("*/config.yaml"))
        raise ConfigError(f"there is no run '{run}'", f"write run=NAME, one of: {', '.join(there) or 'none is there'}")
    names = [word.partition("=")[0] for word in asked.words]
    if idle := [name for name in names if name not in _FROM_HERE]:
        raise ConfigError(
            f"{', '.join(idle)}: the recipe is the run's own, '{run / 'config.yaml'}'",
            f"leave out all but {', '.join(_FROM_HERE)}",
        )
    own = from_yaml(run / "config.yaml")
    own.run, own.cluster.root = asked.run, asked.cluster.root
    if "model.checkpoint" in names:
        own.model.checkpoint = asked.model.checkpoint
    if "model.mtp" in names:
        own.model.mtp = asked.model.mtp
    return own


def pick(run: Path, step: int | None) -> tuple[int, Path]:
    """The checkpoint after `step` completed steps, the newest where it is null; with its step.

    Raises `CheckpointError` with those that are there.
    """
    there = whole(run)
    if there and (step is None or step in there):
        newest = max(there) if step is None else step
        return newest, there[newest]
    named = f"; there are those of step {', '.join(map(str, sorted(there)))}: write step=N" if there else ""
    raise CheckpointError(f"'{run}' has no checkpoint{'' if step is None else f' of step {step}'}{named}")


def whole(run: Path) -> dict[int, Path]:
    """{completed steps: folder}."""
    folder = run / "checkpoints"
    latest = latest_iteration(folder)
    recorded = [p.parent for p in folder.glob(f"step_*/{RECORD}")]
    of_slime = [p.parent for p in folder.glob("iter_*/.metadata")]
    found = {completed(path.name): path for path in (*recorded, *of_slime)}
    return {
        step: path
        for step, path in found.items()
        if step is not None and (step - 1 <= latest or (path / RECORD).is_file())
    }


def completed(name: str) -> int | None:
    """Steps behind a checkpoint of this name; None where no engine gave it. slime's is that of the last one, counted from 0."""
    engine, _, number = name.partition("_")
    return {"step": int(number), "iter": int(number) + 1}.get(engine) if number.isdecimal() else None


def latest_iteration(folder: Path) -> int:
    """The last that Megatron wrote whole, which it says when every rank has written its part; -1 where none was, or where it is
    about to say so."""
    try:
        return int((folder / TRACKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return -1


def steps(run: Path) -> int:
    """Of the whole run, by its plan."""
    plan = read_plan(run)
    with json_file.shape(run / "plan.json", BACK):
        return int(plan["steps"]["count"])


def target(run: Path, step: int) -> Path:
    """Where the export of a step goes: `hf/` after the last step of the run's plan, `hf-stepNNNNNN/` before."""
    return run / ("hf" if step == steps(run) else f"{_EARLIER}{step:06}")


def step_of(export: Path) -> int | None:
    """Completed steps of an export that `target` named; None after the last."""
    return int(export.name.removeprefix(_EARLIER)) if export.name.startswith(_EARLIER) else None


def exported(asked: Recipe) -> tuple[Recipe, Path]:
    """The Hugging Face folder that `checkpoint` names, or the run's `hf/` where it is null, and the recipe it is of: the run's
    own where the folder lies in a run, the words' where it does not, and then they must name `model`.

    Of a run's recipe the words may name anew `model.checkpoint` (the base), the limits in `sanity`, and the machine: `cluster`,
    `gpu`, `engine.python`. Raises `CheckpointError` where there is no such folder with weights, and `ConfigError` where a word
    would have no effect or none says which model it is.
    """
    folder = run_folder(asked) / "hf" if asked.checkpoint is None else Path(asked.checkpoint).absolute()
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in ("model.safetensors.index.json", "model.safetensors")):
        lacking.append("model.safetensors.index.json")
    if lacking:
        there = sorted(str(p.parent) for p in run_folder(asked).parent.glob("*/hf*/config.json"))
        raise CheckpointError(
            f"'{folder}' has no {' and no '.join(lacking)}",
            f"write checkpoint=FOLDER (make: CHECKPOINT=FOLDER) of an export, one of: "
            f"{', '.join(there) or 'none is there'}",
        )
    names = [word.partition("=")[0] for word in asked.words]
    if (folder.parent / "config.yaml").is_file():
        return _served(asked, folder.parent, names), folder
    if "model" not in names:
        raise ConfigError(
            f"'{folder}' lies in no run, and no recipe says what it is", "write model=NAME (make: MODEL=NAME)"
        )
    return asked, folder


def _served(asked: Recipe, run: Path, names: list[str]) -> Recipe:
    """The recipe of the run in this folder, wherever it was trained."""
    elsewhere = "cluster" in names or "gpu" in names
    groups = ("sanity.", *(("cluster.", "gpu.") if elsewhere else ()))
    if idle := [name for name in names if name not in _SERVING and not name.startswith(groups)]:
        raise ConfigError(
            f"{', '.join(idle)}: the recipe is the run's own, '{run / 'config.yaml'}'; leave out all but {', '.join(_SERVING)} "
            "and sanity.NAME",
            "fields of cluster and gpu where one of these is named too",
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
