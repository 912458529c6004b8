"""The rows of `make bench-gpu` as Markdown, and the output of its dry run."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from launch.bench.gpu.cases import Planned
from recipes.config import OptimizerState, Recompute
from recipes.dimensions import flops
from recipes.plan.shown.plan_words import gigabytes

HEAD = (
    "row",
    "layout",
    "tokens/s",
    "transformers",
    "ratio",
    "of the roofline",
    "MFU",
    "peak GB",
    "plan GB",
    "off by",
    "plan's step",
)
NONE = "not measured"


def line(planned: Planned, measured: dict[str, Any]) -> str:
    """Return a row of the table."""
    return f"| {' | '.join(cells(planned, measured))} |"


def step_seconds(measured: dict[str, Any], side: str) -> float | None:
    """Return the median seconds of a side's steps; None if none was measured."""
    seconds = measured.get(side, {}).get("seconds")
    return statistics.median(seconds) if seconds else None


def cells(planned: Planned, measured: dict[str, Any]) -> list[str]:
    """Return the cells of a row. measured: the measurements by side; sides may be missing."""
    step, other, least = (step_seconds(measured, side) for side in ("ours", "theirs", "roofline"))
    tokens, plan = planned.case.tokens, planned.allocated
    peak = measured["ours"]["peak"] if step else None
    work = 3 * flops(planned.recipe.model).batch(planned.case.sequences)
    speed = (planned.recipe.gpu.bf16_tflops or 0) * 1e12
    return [
        planned.case.name,
        layout_of(planned),
        _shown(measured, "ours", f"{tokens / step:,.0f}" if step else ""),
        _shown(measured, "theirs", f"{tokens / other:,.0f}" if other else ""),
        f"{other / step:.2f} ×" if step and other else "–",
        f"{least / step:.0%}" if step and least else "–",
        f"{work / step / speed:.0%}" if step and speed else "–",
        gigabytes(peak) if peak else "–",
        gigabytes(plan),
        f"{plan / peak - 1:+.1%}" if peak else "–",
        f"{planned.step_seconds / step - 1:+.0%}" if step else f"{planned.step_seconds:.1f} s",
    ]


def layout_of(planned: Planned) -> str:
    """Return the layout's settings that save memory on one GPU."""
    p = planned.recipe.layout
    recompute = "nothing again" if p.recompute is Recompute.none else f"{p.recompute.value} again"
    words = [
        recompute,
        *["offloaded"] * p.offload,
        *["optimizer offloaded"] * (p.optimizer_state is OptimizerState.offloaded),
    ]
    return ", ".join(words)


def _shown(measured: dict[str, Any], side: str, figure: str) -> str:
    if figure:
        return figure
    figures = measured.get(side, {})
    return "out of memory" if "out_of_memory" in figures else "failed" if "failed" in figures else NONE


def show_plan(console: Console, rows: Sequence[Planned], sides: Sequence[str], limit: float) -> None:
    """Print the rows in the order of measurement, with the calls in which they are measured. limit: seconds of a call."""
    head = (
        "row",
        "tokens of a step",
        "micro-batches",
        "layout",
        "GB",
        "of the GPU",
        "host GB",
        "step",
        "seconds",
        "call",
    )
    console.print(f"| {rows[0].recipe.gpu.name}: {' | '.join(head)} |\n{'|---' * len(head)}|")
    calls = calls_of(rows, sides, limit)
    for one, numbers in zip(rows, calls, strict=True):
        memory, capacity = one.plan.memory[0], (one.recipe.gpu.memory_mib or 0) * 2**20
        figures = [
            one.case.name, f"{one.case.tokens:,}", str(len(one.batches)), layout_of(one), gigabytes(memory.allocated),
            f"{memory.total / capacity:.0%}", gigabytes(one.plan.host.total), f"{one.step_seconds:.1f} s",
            f"{sum(map(one.part_seconds, sides)):.0f}", "–".join(map(str, sorted({numbers[0], numbers[-1]}))),
        ]  # fmt: skip
        console.print(f"| {' | '.join(figures)} |")
    minutes = sum(one.part_seconds(side) for one in rows for side in sides) / 60
    console.print(
        f"\nEach row is measured as {', '.join(sides)}, each in its own process. This takes about {minutes:.0f} minutes, in "
        f"{calls[-1][-1]} calls of at most {limit} s (limit_s). GB: the tensors' memory by the plan. Of the GPU: with the plan's "
        "allowances. Seconds: of all sides, by estimate. Nothing here is measured."
    )


def calls_of(rows: Sequence[Planned], sides: Sequence[str], limit: float) -> list[list[int]]:
    """Return for each row the numbers of the calls, from 1, in which its sides are measured."""
    call, spent, calls = 1, 0.0, []
    for one in rows:
        numbers = []
        for side in sides:
            takes = one.part_seconds(side)
            if spent and spent + takes > limit:
                call, spent = call + 1, 0.0
            spent += takes
            numbers.append(call)
        calls.append(numbers)
    return calls
