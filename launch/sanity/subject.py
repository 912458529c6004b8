"""The subject of a sanity check: an export, and what is known of its training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from data_prep.pack.dataset import Dataset
from launch.run import prepare, run_plan
from launch.run.metrics import heldout_losses, rates
from launch.run.run_plan import Plan
from launch.run.which_run import step_of, whole
from recipes.config import Recipe


@dataclass(frozen=True)
class Subject:
    """An export with its training.

    recipe: the training's recipe; `model.checkpoint` is the base. folder: where results are written. rates: the learning rate of
    every step, None if unknown. loss: the trainer's loss on the held-out data, None if unknown. checkpoint: the trainer's
    checkpoint of the export's step, None if it does not exist.
    """

    recipe: Recipe
    export: Path
    folder: Path
    data: Dataset
    heldout: Dataset | None
    rates: Sequence[float] | None = None
    loss: float | None = None
    checkpoint: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / "sglang.log"


def of_run(made: Plan, export: Path) -> Subject:
    """Return the subject of an export in its run's folder."""
    run, step = export.parent, step_of(export)
    losses = heldout_losses(run / "metrics.jsonl")
    return Subject(
        made.recipe, export, run if step is None else export.with_name(f"{export.name}-sanity"), made.data, made.heldout,
        rates(run)[:step], losses.get(max(losses, default=0) if step is None else step),
        whole(run).get(made.schedule.num_steps if step is None else step),
    )  # fmt: skip


def of_export(recipe: Recipe, export: Path, console: Console) -> Subject:
    """Return the subject of any export, whether it belongs to a run or not. recipe: as `which_run.exported` returns it."""
    prepare.base(recipe, console)
    if (export.parent / "plan.json").is_file():
        return of_run(replace(run_plan.of_run(export.parent), recipe=recipe), export)
    packed = prepare.packed(recipe, console)
    return Subject(
        recipe, export, Path(recipe.cluster.root) / "sanity" / recipe.run, packed["training"], packed.get("held out")
    )
