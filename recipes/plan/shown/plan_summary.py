"""A plan as plain values, in bytes and seconds: the content of `plan.json`, and the source of the terminal and HTML views."""

from dataclasses import asdict
from typing import Any

from recipes.config import Recipe
from recipes.dimensions import flops, parameters
from recipes.layout import data_parallel, world_size
from recipes.plan.activations import IMBALANCE
from recipes.plan.memory import memory_limit
from recipes.plan.planner import RunPlan, warnings
from recipes.plan.published import calibration
from recipes.plan.saves import saves
from recipes.plan.search import Found, Option
from recipes.plan.serving import foreseen
from recipes.plan.shown.plan_words import degrees_of


def reasons(found: Found) -> dict[str, str]:
    """Return, for every layout field that was searched, the cost of the best layout with another value of that field."""
    return {
        name: "nothing else fits" if other is None else _reason(found.chosen, other, name)
        for name, other in found.other.items()
    }


def _reason(chosen: Option, other: Option, name: str) -> str:
    risk = f", {other.verdict.value}" if other.verdict is not chosen.verdict else ""
    value = str(degrees_of(other.recipe)[name]).replace("_", " ").lower()
    return f"{value}: {other.seconds / chosen.seconds:.2f} x the time{risk}"


def summary(p: RunPlan, other: RunPlan | str) -> dict[str, Any]:
    """Return the plan as plain values, in bytes and seconds.

    other: plan of the recipe that LIMI's authors released, or a text that says why there is none.
    """
    r, counts, cost = p.recipe, parameters(p.recipe.model), flops(p.recipe.model)
    layout = {k: getattr(v, "value", v) for k, v in vars(r.layout).items() if k not in ("search", "fixed", "dp")}
    return {
        "run": r.run,
        "model": {
            "name": r.model.name, "total": counts.total, "active": counts.active, "parts": asdict(counts),
            "rope": r.model.rope.value, "native_context": r.model.native_context, "rope_factor": r.model.rope_factor,
        },
        "cluster": {
            "name": r.cluster.name, "gpu": r.gpu.name, "nodes": r.cluster.nodes, "gpus_per_node": r.cluster.gpus_per_node,
        },
        "engine": r.engine.name.value,
        "layout": layout | {"dp": data_parallel(r), "reasons": reasons(p.found) if p.found else {}},
        "sequences": {
            "source": p.sequences.source, "count": len(p.sequences.lengths), "tokens": sum(p.sequences.lengths),
            "lengths": [*p.sequences.lengths],
        },
        "steps": {
            "count": len(p.steps), "per_epoch": p.schedule.steps_per_epoch, "epochs": r.optim.epochs, "tokens": p.tokens,
            "sizes": [len(s.trajectories) for s in p.steps], "seen": [min(p.seen()), max(p.seen())],
            "learning_rates": p.learning_rates(),
        },
        "memory": _memory(p),
        "time": _time(p, cost.batch(p.sequences.lengths)),
        "schedule": _gantt(p),
        "server": foreseen(r),
        "warnings": [*map(str, warnings(p))],
        "alternatives": [
            {"layout": degrees_of(o.recipe), "seconds_an_epoch": o.seconds / _factor(r), "gpu_share": o.gpu_share}
            for o in (p.found.best if p.found else [])
        ],
        "released": other if isinstance(other, str) else _released(p, other),
    }  # fmt: skip


def _factor(r: Recipe) -> float:
    return calibration(r).factor


def _memory(p: RunPlan) -> dict[str, Any]:
    r = p.recipe
    totals = [s.total for s in p.memory]
    limit = memory_limit(r)
    return {
        "limit": limit, "verdict": p.verdict.value, "peak": max(totals), "peak_stage": totals.index(max(totals)),
        "stages": [asdict(s) | {"total": s.total} for s in p.memory], "expert_imbalance": IMBALANCE if r.model.experts else None,
        "host": asdict(p.host) | {"total": p.host.total, "limit": (r.cluster.host_memory_gb or 0) * 1e9 or None},
        "disk": asdict(saves(r, p.schedule.num_steps)),
    }  # fmt: skip


def _time(p: RunPlan, epoch_flops: int) -> dict[str, Any] | None:
    """Return the predicted times of the run, or None if nothing is predicted. epoch_flops: forward operations of an epoch."""
    if p.clock is None:
        return None
    r, gpus = p.recipe, world_size(p.recipe)
    seconds, hours = p.seconds, p.seconds / 3600
    assert r.gpu.bf16_tflops is not None, "predictable"
    work = 3 * epoch_flops / sum(p.sequences.lengths) * p.tokens
    names, repeats = p.step_seconds[0], p.schedule.num_steps / p.schedule.steps_per_epoch
    return {
        "calibration": calibration(r).text,
        "seconds": seconds,
        "steps": [sum(parts.values()) for parts in p.step_seconds],
        "parts": {name: repeats * sum(parts[name] for parts in p.step_seconds) for name in names},
        "tokens_per_second_per_gpu": p.tokens / seconds / gpus,
        "mfu": work / seconds / gpus / (r.gpu.bf16_tflops * 1e12),
        "gpu_hours": hours * gpus,
        "cost": hours * gpus * r.gpu.hour_price if r.gpu.hour_price is not None else None,
    }


def _gantt(p: RunPlan) -> list[dict[str, Any]]:
    """Return the passes of the slowest pipeline in the first step, in seconds. The list is empty if nothing is predicted."""
    if p.clock is None:
        return []
    forward, backward = (seconds / _factor(p.recipe) for seconds in p.clock.times(*p.loads[0]))
    rank = int(p.clock.pipeline.makespan(forward, backward).argmax())
    return [
        {"stage": one.stage, "chunk": one.chunk, "micro_batch": one.micro_batch, "forward": one.forward,
         "start": start, "end": end}
        for one, start, end in p.clock.pipeline.passes(forward[:, rank], backward[:, rank])
    ]  # fmt: skip


def _released(p: RunPlan, other: RunPlan) -> dict[str, Any]:
    return {
        "layout": degrees_of(other.recipe), "steps": len(other.steps), "seen": [min(other.seen()), max(other.seen())],
        "peak": max(s.total for s in other.memory), "verdict": other.verdict.value, "host": other.host.total,
        "seconds": other.seconds, "seconds_an_epoch": other.seconds_an_epoch, "warnings": [*map(str, warnings(other))],
        "learning_rates": other.learning_rates(),
        "speed_up": other.seconds_an_epoch / p.seconds_an_epoch if p.clock else None,
    }  # fmt: skip
