"""The plan of a run with its data: the schedules of both data sets, and the planner's result."""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.files import write_text
from data_prep.pack.dataset import Dataset, open_dataset
from recipes import json_file
from recipes.compose.recipe import from_yaml
from recipes.config import Recipe, Sampling
from recipes.errors import ConfigError, DataError
from recipes.layout import world_size
from recipes.plan import planner
from recipes.plan.planner import RunPlan
from recipes.plan.search import Sequences
from recipes.plan.shown import plan_summary
from recipes.schedule.fill_ranks import check_filled
from recipes.schedule.schedule import Rehearsal, Schedule, schedule_of

BACK = "bring that file back as it was"  # the fix for a broken file of a run


@dataclass(frozen=True)
class Plan:
    """The recipe with its packed data sets. `heldout` is None without held-out trajectories.

    rehearsal: run the two steps of `recipes.schedule.schedule.Rehearsal` instead of the recipe's steps.
    """

    recipe: Recipe
    data: Dataset
    heldout: Dataset | None
    rehearsal: bool = False

    @property
    def world_size(self) -> int:
        return world_size(self.recipe)

    @cached_property
    def schedule(self) -> Schedule:
        """The training steps. Raise `ConfigError` if the data cannot be distributed over the ranks."""
        schedule = schedule_of(self.recipe, self.data.trajectory, self.data.lengths)
        if self.rehearsal:
            return Rehearsal(**{f.name: getattr(schedule, f.name) for f in fields(schedule) if f.init})
        check_filled(self.recipe, schedule)
        return schedule

    @cached_property
    def heldout_schedule(self) -> Schedule:
        """One step that contains every held-out sequence once."""
        assert self.heldout is not None
        schedule = schedule_of(self.recipe, self.heldout.trajectory, self.heldout.lengths)
        schedule = replace(schedule, batch_size=len(self.heldout.ids), epochs=1, copies=1, sampling=Sampling.epochs)
        check_filled(self.recipe, schedule, "data.heldout")
        return schedule

    @cached_property
    def planned(self) -> RunPlan:
        """The planner's result for this recipe and data."""
        return planner.make_plan(self.recipe, Sequences(self.data.trajectory, self.data.lengths, self.recipe.data.path))

    def summary(self) -> dict[str, Any]:
        """Return the planner's summary with the folders and counts of the data, for `plan.json`."""
        return {
            **plan_summary.summary(self.planned, planner.released(self.planned)),
            "rehearsal": self.rehearsal,
            "data": {"folder": str(self.data.folder), **self.data.manifest["counts"]},
            "heldout": self.heldout and {"folder": str(self.heldout.folder), **self.heldout.manifest["counts"]},
        }

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.summary(), indent=2) + "\n")


def of_run(root: Path) -> Plan:
    """Return the plan of a run folder, from its `config.yaml` and `plan.json`.

    Raise `ConfigError` if no run has started there, `CheckpointError` if its plan cannot be read, and `DataError` if its packed
    data is gone.
    """
    if not (root / "plan.json").is_file():
        raise ConfigError(f"no run has begun in '{root}'", "write run=NAME of one that has")
    written = read_plan(root)
    with json_file.shape(root / "plan.json", BACK):
        data = Path(written["data"]["folder"])
        heldout = Path(written["heldout"]["folder"]) if written["heldout"] else None
        rehearsal = bool(written["rehearsal"])
    recipe = from_yaml(root / "config.yaml")
    return Plan(recipe, _packed(data), _packed(heldout) if heldout else None, rehearsal)


def _packed(folder: Path) -> Dataset:
    if not folder.is_dir():
        raise DataError(
            f"the packed data of the run, '{folder}', is gone",
            "put it back, or run `make data` with the overrides of the run, which packs it there again",
        )
    return open_dataset(folder)


def read_plan(root: Path) -> dict[str, Any]:
    """Return the `plan.json` of a run folder, as `Plan.write` wrote it. Raise `CheckpointError` if it cannot be read."""
    return json_file.read_json(root / "plan.json", BACK)
