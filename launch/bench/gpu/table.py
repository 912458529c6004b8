"""The table of `make bench-gpu`, and the output of its dry run."""

import statistics
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from rich.console import Console

from launch.bench.gpu.cases import BAND, PARTS, Planned
from recipes.config import OptimizerState, Recompute
from recipes.dimensions import flops
from recipes.plan.planner import RunPlan
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


def show_table(console: Console, rows: Sequence[tuple[Planned, dict[str, Any]]]) -> None:
    """Print the table as Markdown for `launch/bench/GPU.md`, then the versions, and the rates for `hydra_conf/gpu`."""
    console.print(f"\n| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for row in sorted(rows, key=lambda row: row[0].case.parts != PARTS):
        console.print(line(*row))
    environments = [
        part["environment"] for _, measured in rows for part in measured.values() if "gpu" in part["environment"]
    ]
    texts = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.items()) for one in environments)
    console.print("\n" + ("\n".join(texts) or "Nothing has been measured yet."))
    for text in calibrated(rows):
        console.print(text)


def line(planned: Planned, measured: dict[str, Any]) -> str:
    """Return a row of the table, or the sentence that compares the GPU's loss with the CPU's."""
    if planned.case.parts == PARTS:
        return f"| {' | '.join(cells(planned, measured))} |"
    gpu, cpu = (_good(measured.get(part)) for part in planned.case.parts)
    if not (gpu and cpu):
        return f"\n{planned.case.name}: {NONE}"
    difference = abs(gpu["loss"] - cpu["loss"])
    return (
        f"\n{planned.case.name}: loss of the first step {gpu['loss']:.5f}, by the CPU engine in fp32 {cpu['loss']:.5f}, "
        f"{difference:.1e} apart (to reach: {BAND:g})"
    )


def cells(planned: Planned, measured: dict[str, Any]) -> list[str]:
    """Return the cells of a row. measured: the measurements by part; parts may be missing."""
    ours, theirs, least = (_good(measured.get(part)) for part in ("ours", "transformers", "roofline"))
    step, other = (statistics.median(one["seconds"]) if one else None for one in (ours, theirs))
    tokens, plan = planned.case.tokens, planned.allocated
    peak = ours["peak"] if ours else None
    work = 3 * flops(planned.recipe.model).batch(planned.case.sequences)
    speed = (planned.recipe.gpu.bf16_tflops or 0) * 1e12
    return [
        planned.case.name,
        _layout(planned),
        _shown(measured, "ours", f"{tokens / step:,.0f}" if step else ""),
        _shown(measured, "transformers", f"{tokens / other:,.0f}" if other else ""),
        f"{other / step:.2f} ×" if step and other else "–",
        f"{sum(least['seconds'].values()) / step:.0%}" if step and least else "–",
        f"{work / step / speed:.0%}" if step and speed else "–",
        gigabytes(peak) if peak else "–",
        gigabytes(plan),
        f"{plan / peak - 1:+.1%}" if peak else "–",
        f"{planned.step_seconds / step - 1:+.0%}" if step else f"{planned.step_seconds:.1f} s",
    ]


def _layout(planned: Planned) -> str:
    """Return the layout's settings that save memory on one GPU."""
    p = planned.recipe.layout
    recompute = "nothing again" if p.recompute is Recompute.none else f"{p.recompute.value} again"
    words = [
        recompute,
        *["offloaded"] * p.offload,
        *["optimizer offloaded"] * (p.optimizer_state is OptimizerState.offloaded),
    ]
    return ", ".join(words)


def _good(part: dict[str, Any] | None) -> dict[str, Any] | None:
    return part if part and "seconds" in part else None


def _shown(measured: dict[str, Any], part: str, figure: str) -> str:
    if figure:
        return figure
    return "out of memory" if part in measured else NONE


def calibrated(rows: Sequence[tuple[Planned, dict[str, Any]]]) -> list[str]:
    """Return the median efficiencies of every second measured row, for `hydra_conf/gpu`, with the prediction errors on the other
    rows. Return nothing if fewer than two rows are complete."""
    whole = [
        (p, f) for p, f in rows if p.case.parts == PARTS and all(_good(f.get(part)) for part in ("ours", "roofline"))
    ]
    fitted, held = whole[::2], whole[1::2]
    if not held:
        return []
    peak = (whole[0][0].recipe.gpu.bf16_tflops or 0) * 1e12
    names = {"products": "matmul", "attention": "attention", "attention backward": "attention_backward"}
    shares = {
        f"{ours}_efficiency": statistics.median(f["roofline"]["tflops"][part] for _, f in fitted) * 1e12 / peak
        for part, ours in names.items()
    }
    errors = [
        f"{predicted(p, shares) / statistics.median(f['ours']['seconds']) - 1:+.0%} on {p.case.name}" for p, f in held
    ]
    fitted_on = ", ".join(p.case.name for p, _ in fitted)
    figures = " ".join(f"{name}={value:.2f}" for name, value in shares.items())
    return [f"\nRates of {fitted_on}: {figures}. A step predicted with them: {', '.join(errors)}."]


def predicted(planned: Planned, shares: dict[str, float]) -> float:
    """Return the predicted seconds of a step. shares: the GPU's efficiencies, as shares of its peak rate."""
    gpu = copy(planned.recipe.gpu)
    for name, value in shares.items():
        setattr(gpu, name, value)
    return Planned(planned.case, RunPlan(replace(planned.recipe, gpu=gpu), planned.plan.sequences, None)).step_seconds


def show_plan(console: Console, rows: Sequence[Planned], limit: float) -> None:
    """Print the rows in the order of measurement, with the calls in which they are measured. limit: seconds of a call."""
    head = ("row", "tokens of a step", "micro-batches", "layout", "GB", "of the GPU", "step", "call")
    console.print(f"| {rows[0].recipe.gpu.name}: {' | '.join(head)} |\n{'|---' * len(head)}|")
    calls = calls_of(rows, limit)
    for one, numbers in zip(rows, calls, strict=True):
        memory, capacity = one.plan.memory[0], (one.recipe.gpu.memory_mib or 0) * 2**20
        figures = [
            one.case.name, f"{one.case.tokens:,}", str(len(one.batches)), _layout(one),
            gigabytes(memory.allocated), f"{memory.total / capacity:.0%}", f"{one.step_seconds:.1f} s",
            "–".join(map(str, sorted({numbers[0], numbers[-1]}))),
        ]  # fmt: skip
        console.print(f"| {' | '.join(figures)} |")
    minutes = sum(one.part_seconds(part) for one in rows for part in one.case.parts) / 60
    console.print(
        f"\nEach row is measured as {', '.join(PARTS)}, the last row as ours on the GPU and on the CPU, each in its own process. This "
        f"takes about {minutes:.0f} minutes, in {calls[-1][-1]} calls of at most {limit} s (limit_s). GB: the tensors' memory by the "
        "plan. Of the GPU: with the plan's allowances. Nothing here is measured."
    )


def calls_of(rows: Sequence[Planned], limit: float) -> list[list[int]]:
    """Return for each row the numbers of the calls, from 1, in which its parts are measured."""
    call, spent, calls = 1, 0.0, []
    for one in rows:
        numbers = []
        for part in one.case.parts:
            takes = one.part_seconds(part)
            if spent and spent + takes > limit:
                call, spent = call + 1, 0.0
            spent += takes
            numbers.append(call)
        calls.append(numbers)
    return calls
