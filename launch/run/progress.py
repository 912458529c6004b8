"""Show training progress: a bar on a terminal, otherwise lines."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 20  # about as many per run without a terminal; each step over 10 s also gets a line


@contextlib.contextmanager
def training(console: Console, total: int, completed: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function to call with the metrics of each step."""
    columns = (
        TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    seconds: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=total, completed=completed, loss=float("nan"), speed=0.0)

        def advance(line: dict[str, Any]) -> None:
            step_s = line["time"]["step_s"]
            seconds.append(step_s)
            speed = line["tokens"] / step_s
            bar.update(task, advance=1, loss=line["loss"], speed=speed)
            slow = step_s > 10
            if not console.is_terminal and (
                slow or line["step"] % max(1, total // LINES) == 0 or line["step"] == total
            ):
                usual = seconds[1:] or seconds  # the first step also compiles
                left = sum(usual) / len(usual) * (total - line["step"])
                console.print(
                    f"step {line['step']}/{total}  loss {line['loss']:.4f}  {step_s:.2f} s  {speed:,.0f} tokens/s  {_clock(left)} left"
                )

        yield advance


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
