"""Repetition of one step of a run, as a whole and sequence by sequence. It shows why the step diverged, and whether it is
reproducible."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from launch.megatron.engine import started
from launch.run import metrics, run_state
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from recipes import json_file


def replay_step(plan: Plan, run: RunFolder, step: int, console: Console) -> None:
    """Train from the last checkpoint before step `step` (the first is 1) up to that step, and compare its figures with the run's.
    Then show the loss and gradient norm of each of its sequences alone.

    The step itself updates no weights, and nothing is written. Raise `ConfigError` if the run has another recipe.
    """
    completed, checkpoint = run.before(step)
    run_state.refuse_weights_alone(checkpoint, plan.recipe)
    console.print(f"from {checkpoint or plan.recipe.model.checkpoint}, {step - 1 - completed} steps before step {step}")
    with started(plan, checkpoint, console) as ranks:
        for earlier in _track(range(completed, step - 1), "Steps before", console):
            ranks.call("train_step", earlier)
        whole = ranks.call("gradient", step - 1)[0]
        console.print(f"step {step}: {metrics.shown(whole)}; {_compared(run.root, step, whole)}")
        sequences = plan.schedule.step(step - 1).sequences
        rows = [(s, ranks.call("sequence_gradient", s)[0]) for s in _track(sequences, "Sequences", console)]
    console.print(_table(plan, rows))


def _track(numbers: Sequence[int], what: str, console: Console) -> Iterable[int]:
    return track(numbers, what, console=console, transient=True, disable=not console.is_terminal)


def _compared(root: Path, step: int, figures: dict[str, Any]) -> str:
    recorded = {
        line["step"]: metrics.shown(line) for line in metrics.read_metrics(root / "metrics.jsonl") if "loss" in line
    }
    if (root / "diverged.json").exists():
        path, away = root / "diverged.json", "move that file away"
        diverged = json_file.read_json(path, away)
        with json_file.shape(path, away):
            recorded.setdefault(int(diverged["step"]), str(diverged["problem"]))
    if step not in recorded:
        return "the run recorded no figures of this step"
    # The record of a diverged step has its figures first, and then what is wrong with them.
    same = f"{recorded[step]}, ".startswith(f"{metrics.shown(figures)}, ")
    return "the same in the run, bit for bit" if same else f"{recorded[step]} in the run"


def _table(plan: Plan, rows: list[tuple[int, dict[str, Any]]]) -> Table:
    """Build the table of sequences, with the largest gradient norm first."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("id", "segment", "tokens", "supervised", "loss", "gradient norm"):
        table.add_column(column, justify="left" if column == "id" else "right")
    for s, figures in sorted(rows, key=lambda row: -row[1]["grad_norm"]):
        counts = f"{plan.data.segments[s]}", f"{plan.data.lengths[s]:,}", f"{plan.data.supervised[s]:,}"
        table.add_row(plan.data.ids[s], *counts, f"{figures['loss']:.4f}", f"{figures['grad_norm']:.4g}")
    return table
