"""What a run will do, step by step, once its data is there: the schedule on both data sets and the learning rates."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.dataset import Dataset
from data_prep.files import write_text
from recipes.config import Recipe, Recompute
from recipes.dimensions import flops
from recipes.layout import batch_multiple, data_parallel, micro_batch_multiple, sequence_multiple, world_size
from recipes.learning_rate import learning_rate
from recipes.pipeline import Pipeline
from recipes.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """The recipe with its two packed data sets."""

    recipe: Recipe
    data: Dataset
    heldout: Dataset

    @property
    def world_size(self) -> int:
        return world_size(self.recipe)

    @cached_property
    def schedule(self) -> Schedule:
        """The training steps. Raises `ConfigError` where the data cannot be spread over the ranks."""
        optim = self.recipe.optim
        schedule = self._schedule(self.data, optim.batch_size, optim.epochs)
        schedule.check()
        return schedule

    @cached_property
    def heldout_schedule(self) -> Schedule:
        """One step that holds every held-out sequence once."""
        schedule = self._schedule(self.heldout, len(self.heldout.ids), 1)
        schedule.check()
        return schedule

    def _schedule(self, data: Dataset, batch_size: int, epochs: int) -> Schedule:
        layout = self.recipe.layout
        cost = flops(self.recipe.model)
        return Schedule(
            trajectory=data.trajectory,
            lengths=data.lengths,
            costs=[cost.sequence(n) for n in data.lengths],
            batch_size=batch_size,
            epochs=epochs,
            seed=self.recipe.seed,
            dp=data_parallel(self.recipe),
            max_tokens=layout.max_tokens_per_gpu * layout.cp,
            sequence_multiple=sequence_multiple(layout),
            batch_multiple=batch_multiple(layout),
            micro_batch_multiple=micro_batch_multiple(layout),
            pipeline=Pipeline(layout.pp, 3.0 if layout.recompute is Recompute.full else 2.0),
        )

    def summary(self) -> dict[str, Any]:
        """The plan as plain values, for `plan.json`."""
        steps = self.schedule.num_steps
        return {
            "world_size": self.world_size,
            "data_parallel": data_parallel(self.recipe),
            "steps": steps,
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "epochs": self.recipe.optim.epochs,
            "data": {
                "folder": str(self.data.folder),
                **self.data.manifest["counts"],
                "longest": max(self.data.lengths),
            },
            "heldout": {"folder": str(self.heldout.folder), **self.heldout.manifest["counts"]},
            "learning_rates": [learning_rate(self.recipe.optim, step, steps) for step in range(steps)],
        }

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.summary(), indent=2) + "\n")
