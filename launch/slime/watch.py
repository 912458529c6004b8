"""What a start of slime shows while it runs: its steps, its checkpoints, and missing nodes. Steps are its signs of life, not its
log."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.files import write_text
from launch.run import metrics, which_run
from launch.run.run_folder import RunFolder
from launch.slime import checkpoints
from launch.slime.hooks import nodes, stop
from recipes.config import Recipe
from recipes.errors import TrainError
from recipes.plan.saves import saves

LOG = "train.log"  # output of slime and its processes; every start appends


class Lines:
    """The lines that are added to a metrics file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = path.stat().st_size if path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines added since the last call. A line that another node has not finished is left for the next call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.seen)
            new = file.read()
        parsed = []
        for line in new[: new.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                parsed.append(json.loads(line))
            except ValueError:  # a network file system may show zeros before it shows the line
                break
            self.seen += len(line)
        return parsed


class Watch:
    """The files of a run folder that a start of slime changes, watched from the start on."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, total: int, console: Console, advance: Callable[[dict[str, Any]], None]
    ) -> None:
        """total: the run's steps. advance: called with the metrics of each step."""
        self.recipe, self.run, self.total, self.console, self.advance = recipe, run, total, console, advance
        self._lines = Lines(run.root / metrics.NAME)
        self._checkpoint = which_run.latest_iteration(run.root / "checkpoints")
        self._shortage = ""
        self._alive = time.monotonic()
        self._stopping = False

    def look(self) -> None:
        """Show what is new. Raise `TrainError` if there was no sign of life for `engine.timeout`."""
        for line in self._lines.read():
            self._alive = time.monotonic()
            if "loss" in line:
                self.advance(line)
        checkpoints.settle(self.run)
        if (latest := which_run.latest_iteration(self.run.root / "checkpoints")) != self._checkpoint:
            self._checkpoint, self._alive = latest, time.monotonic()
        self._look_at_nodes()
        if time.monotonic() - self._alive > self.recipe.engine.timeout:
            raise TrainError(
                f"slime finished no step and no checkpoint for engine.timeout={self.recipe.engine.timeout} s",
                f"raise engine.timeout, or read {self.run.root / LOG}",
            )

    def _look_at_nodes(self) -> None:
        path = self.run.root / nodes.SHORTAGE
        shortage = path.read_text(encoding="utf-8") if path.exists() else ""
        if shortage != self._shortage:
            limit = self.recipe.engine.node_timeout
            awaited = f"{shortage}; waiting" + (f" for engine.node_timeout={limit} s" if limit else "")
            self.console.print(awaited if shortage else "every node is in the cluster again", style="yellow")
            self._shortage = shortage
        if shortage:  # the watch on nodes has its own limit
            self._alive = time.monotonic()

    def request_stop(self, signal_name: str) -> None:
        """Ask slime once to save after the current step and to end, and say how long that may take."""
        if self._stopping:
            return
        self._stopping = True
        write_text(self.run.root / stop.REQUEST, signal_name)
        done = metrics.completed(self.run.root)
        steps = [
            line["time"]["step_s"] for line in metrics.read_metrics(self.run.root / metrics.NAME) if "loss" in line
        ]
        step = f"a step took up to {max(steps):,.0f} s" if steps else "no step has ended yet"
        seconds = saves(self.recipe, self.total).seconds
        save = f", a save takes about {seconds:,.0f} s" if seconds else ""
        saved = self._checkpoint + 1
        self.console.print(
            f"{signal_name}: slime saves after step {done + 1} and ends ({step}{save}). If it is killed before, the run goes on from "
            + (f"step {saved}" if saved else "its base"),
            style="yellow",
        )
