"""Terminal view of a plan, from its summary (`plan_summary.summary`)."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from recipes.plan.shown.plan_words import (
    degrees,
    disk_rows,
    duration,
    gigabytes,
    headline,
    layout_rows,
    memory_rows,
    released_rows,
    steps_rows,
)

_STAGES = 8  # stage columns that fit into 80 characters
_COLOUR = {"fits": "green", "risky": "yellow", "does not fit": "red"}


def plan_tables(s: dict[str, Any]) -> Iterator[RenderableType]:
    """Yield everything to print, in order. s: the plan's summary."""
    yield Text(headline(s), f"bold {_COLOUR[s['memory']['verdict']]}")
    for warning in s["warnings"]:
        yield Text(f"! {warning}", "yellow")
    yield _table("Layout", ["", "", "with another value"], layout_rows(s))
    yield _memory(s)
    yield _table("Steps", ["", ""], steps_rows(s))
    yield _table("Disk", ["", ""], disk_rows(s["memory"]["disk"]))
    yield Text(f"The check at the end: {s['server']}.\n", "dim")
    if s["time"]:
        yield _table("Time", ["", "", ""], [*_time_rows(s["time"])])
        yield Text(s["time"]["calibration"], "dim")
    else:
        yield Text("Time: nothing is predicted for a CPU.\n", "dim")
    if s["alternatives"]:
        rows = [
            [degrees(a["layout"]), duration(a["seconds_an_epoch"]), f"{a['gpu_share']:.0%}"] for a in s["alternatives"]
        ]
        yield _table("The best layouts", ["", "an epoch", "GPU memory"], rows)
    if isinstance(s["released"], str):
        yield Text(f"The released recipe beside it: none ({s['released']})\n", "dim")
    else:
        yield _table("Beside the released recipe", ["", "this recipe", "released"], released_rows(s))


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(head))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _memory(s: dict[str, Any]) -> Table:
    """Return the table of memory in GB, by part and pipeline stage."""
    m = s["memory"]
    stages = range(len(m["stages"]))
    shown = [i for i in stages if len(stages) <= _STAGES or i in (0, 1, m["peak_stage"], stages[-1])]
    rows = [[row[0], *(row[1 + i] for i in shown)] for row in memory_rows(s)]
    title = "Memory of a rank by pipeline stage, GB" + f" ({len(shown)} of {len(stages)})" * (len(shown) < len(stages))
    table = _table(title, ["", *map(str, shown)], rows)
    limit = f" of {gigabytes(m['host']['limit'])}" if m["host"]["limit"] else ""
    table.caption = (
        f"host: {gigabytes(m['host']['total'])}{limit} GB a node (optimizer {gigabytes(m['host']['optimizer'])}, "
        f"activations {gigabytes(m['host']['activations'])}, copy of the "
        f"weights {gigabytes(m['host']['weights_copy'])}, Ray's object store {gigabytes(m['host']['object_store'])})"
    )
    table.caption_justify = "left"
    return table


def _time_rows(time: dict[str, Any]) -> Iterator[list[str]]:
    for name, seconds in time["parts"].items():
        if seconds > 0.0005 * time["seconds"]:
            yield [name, duration(seconds), f"{seconds / time['seconds']:.0%}"]
    yield ["all optimizer steps", duration(time["seconds"]), f"{time['gpu_hours']:.1f} GPU-hours"]
    if time["cost"] is not None:
        yield ["cost, in the currency of gpu.hour_price", f"{time['cost']:,.2f}", ""]
    yield ["tokens a second and GPU", f"{time['tokens_per_second_per_gpu']:,.0f}", f"MFU {time['mfu']:.0%}"]
