"""One step of a run again, whole and sequence by sequence: what made it diverge, and whether it does so again."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from launch.megatron.engine import started
from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from recipes import json_file


def replay_step(plan: Plan, run: RunFolder, step: int, console: Console) -> None:
    """Goes from the last checkpoint before step `step` (the first is 1) up to it, and shows its figures beside those of the
    run, then the loss and gradient norm of each of its sequences alone. Nothing is updated or written.

    Raises `ConfigError` where the run is of another recipe.
    """
    completed, checkpoint = run.before(step)
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


def _compared(root: Path, step: int, found: dict[str, Any]) -> str:
    recorded = {m["step"]: metrics.shown(m) for m in metrics.read(root / "metrics.jsonl") if "loss" in m}
    if (root / "diverged.json").exists():
        path, away = root / "diverged.json", "move that file away"
        diverged = json_file.read(path, away)
        with json_file.shape(path, away):
            recorded.setdefault(int(diverged["step"]), str(diverged["problem"]))
    if step not in recorded:
        return "the run has no figures of it"
    # After the figures of a step that diverged stands what was wrong with them.
    same = f"{recorded[step]}, ".startswith(f"{metrics.shown(found)}, ")
    return "the same in the run, bit for bit" if same else f"{recorded[step]} in the run"


def _table(plan: Plan, rows: list[tuple[int, dict[str, Any]]]) -> Table:
    """Sequences, those with the largest gradient first."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("id", "segment", "tokens", "supervised", "loss", "gradient norm"):
        table.add_column(column, justify="left" if column == "id" else "right")
    for s, found in sorted(rows, key=lambda row: -row[1]["grad_norm"]):
        counts = f"{plan.data.segments[s]}", f"{plan.data.lengths[s]:,}", f"{plan.data.supervised[s]:,}"
        table.add_row(plan.data.ids[s], *counts, f"{found['loss']:.4f}", f"{found['grad_norm']:.4g}")
    return table
