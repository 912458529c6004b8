"""How far training is: a bar on a terminal, lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 20  # of a run, where there is no terminal: fewer for quick steps


@contextlib.contextmanager
def training(console: Console, total: int, completed: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what to call with the metrics of each step."""
    columns = (
        TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    seconds = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=total, completed=completed, loss=float("nan"), speed=0.0)

        def advance(line: dict[str, Any]) -> None:
            nonlocal seconds
            took = line["time"]["step_s"]
            seconds += took
            speed = line["tokens"] / took
            bar.update(task, advance=1, loss=line["loss"], speed=speed)
            slow = took > 10
            if not console.is_terminal and (
                slow or line["step"] % max(1, total // LINES) == 0 or line["step"] == total
            ):
                left = seconds / (line["step"] - completed) * (total - line["step"])
                console.print(
                    f"step {line['step']}/{total}  loss {line['loss']:.4f}  {took:.2f} s  {speed:,.0f} tokens/s  {_clock(left)} left"
                )

        yield advance


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
