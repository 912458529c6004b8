"""What a run will do, step by step, once its data is there: the schedule on both data sets and the learning rates."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.dataset import Dataset
from data_prep.files import write_text
from recipes.config import Recipe, Sampling
from recipes.layout import data_parallel, world_size
from recipes.learning_rate import learning_rate
from recipes.schedule import Schedule, schedule_of


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
        schedule = schedule_of(self.recipe, self.data.trajectory, self.data.lengths)
        schedule.check()
        return schedule

    @cached_property
    def heldout_schedule(self) -> Schedule:
        """One step that holds every held-out sequence once."""
        schedule = schedule_of(self.recipe, self.heldout.trajectory, self.heldout.lengths)
        schedule = replace(schedule, batch_size=len(self.heldout.ids), epochs=1, copies=1, sampling=Sampling.epochs)
        schedule.check()
        return schedule

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
