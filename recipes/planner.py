"""What a recipe will do on its cluster, before a GPU is taken: steps, memory, time, cost, and what is odd about it.

Pure Python: neither torch nor ray. `plan_page.py` and `plan_table.py` show it, `summary` is `plan.json`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from recipes.activations import IMBALANCE
from recipes.compose import compose_recipe
from recipes.config import Recipe, Rope
from recipes.context import check_context
from recipes.dimensions import flops, parameters
from recipes.errors import ConfigError
from recipes.layout import check_layout, data_parallel, round_up, world_size
from recipes.learning_rate import learning_rate
from recipes.memory import (
    HostMemory,
    Load,
    StageMemory,
    Verdict,
    disk,
    gpu_memory,
    host_memory,
    memory_limit,
    verdict,
)  # fmt: skip
from recipes.plan_words import degrees_of
from recipes.published import calibration
from recipes.schedule import Schedule, Step, schedule_of
from recipes.search import Found, Option, Sequences, search
from recipes.step_time import Clock, predictable


@dataclass(frozen=True)
class RunPlan:
    """A recipe with its layout settled, over these sequences."""

    recipe: Recipe
    sequences: Sequences
    found: Found | None  # of the search, where there was one

    @cached_property
    def schedule(self) -> Schedule:
        return schedule_of(self.recipe, self.sequences.trajectory, self.sequences.lengths)

    @cached_property
    def steps(self) -> list[Step]:
        """Of the whole run, those after the first epoch without the search inside a step: it moves sequences between
        micro-batches, and no trajectory to another step."""
        quick = replace(self.schedule, rounds=0)
        later = range(self.schedule.steps_per_epoch, self.schedule.num_steps)
        return [*map(self.schedule.step, range(self.schedule.steps_per_epoch)), *map(quick.step, later)]

    @cached_property
    def loads(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.schedule.loads(step) for step in self.steps]

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Of every stage, each in the step that fills it most."""
        all_steps = [gpu_memory(self.recipe, Load(tokens.tolist())) for tokens, _ in self.loads]
        return [max(stage, key=lambda s: s.total) for stage in zip(*all_steps, strict=True)]

    @cached_property
    def host(self) -> HostMemory:
        return host_memory(self.recipe, int(max(tokens.sum() for tokens, _ in self.loads)))

    @property
    def verdict(self) -> Verdict:
        """The worse of GPU and host."""
        shares = [max(s.total for s in self.memory) / memory_limit(self.recipe)]
        if host := self.recipe.cluster.host_memory_gb:
            shares.append(self.host.total / (host * 1e9))
        return verdict(max(shares), 1.0)

    @cached_property
    def clock(self) -> Clock | None:
        return Clock(self.recipe) if predictable(self.recipe) else None

    @cached_property
    def step_seconds(self) -> list[dict[str, float]]:
        """Seconds of the first epoch's steps by part, calibrated; empty where nothing is predicted."""
        if self.clock is None:
            return []
        slower = 1 / calibration(self.recipe.gpu).factor
        first = self.loads[: self.schedule.steps_per_epoch]
        return [{name: slower * x for name, x in self.clock.step(*load).items()} for load in first]

    @property
    def seconds(self) -> float:
        """Of the run: its later epochs train on the same sequences in another order."""
        repeats = self.schedule.num_steps / self.schedule.steps_per_epoch
        return repeats * sum(sum(parts.values()) for parts in self.step_seconds)

    @property
    def tokens(self) -> int:
        """Trained on in the whole run, padding left out."""
        return sum(self.sequences.lengths[s] for step in self.steps for rank in step.ranks for b in rank for s in b)

    @property
    def seconds_an_epoch(self) -> float:
        """Of as many sequences as the data has: what runs of unlike numbers of steps are compared by."""
        return self.seconds * sum(self.sequences.lengths) / self.tokens

    def learning_rates(self) -> list[float]:
        steps = len(self.steps)
        return [learning_rate(self.recipe.optim, n, steps) for n in range(steps)]

    def seen(self) -> list[int]:
        """Times each trajectory is trained on."""
        counts = dict.fromkeys(self.sequences.trajectory, 0)
        for step in self.steps:
            for trajectory in step.trajectories:
                counts[trajectory] += 1
        return [*counts.values()]


def plan(r: Recipe, sequences: Sequences) -> RunPlan:
    """The plan, its layout searched for where the recipe says `layout=auto`. Raises `ConfigError` for what cannot be run."""
    longest = max(sequences.lengths)
    check_context(r.model, longest)
    found = None
    if r.layout.search:
        if not predictable(r):
            raise ConfigError(
                "layout=auto compares predicted times, and nothing is predicted for a CPU; write layout=data_parallel, or "
                "cluster=h100x8"
            )
        found = search(r, sequences)
        r = found.chosen.recipe
    return RunPlan(r, sequences, found)


def released(p: RunPlan) -> RunPlan | str:
    """The public LIMI recipe of this model on the same cluster and data, or why there is none."""
    r = p.recipe
    size = [f"cluster.nodes={r.cluster.nodes}", f"cluster.gpus_per_node={r.cluster.gpus_per_node}"]
    try:
        theirs = compose_recipe([f"model={r.model.name}", "experiment=released", f"cluster={r.cluster.name}", *size])
        theirs = replace(theirs, cluster=r.cluster, gpu=r.gpu, engine=r.engine, data=r.data)
        check_layout(theirs)
        made = plan(theirs, p.sequences)
        made.schedule.check()
    except ConfigError as error:
        return str(error)
    return made


def refuse_too_large(p: RunPlan) -> None:
    """Raises `ConfigError` where the plan does not fit, with what would."""
    if p.verdict is not Verdict.does_not_fit:
        return
    totals = [s.total for s in p.memory]
    stage, limit, host = totals.index(max(totals)), memory_limit(p.recipe), p.recipe.cluster.host_memory_gb
    text = f"the fullest rank, of stage {stage}, needs {max(totals) / 1e9:,.1f} GB of {limit / 1e9:,.1f} GB"
    if host:
        text += f", a node's host {p.host.total / 1e9:,.0f} GB of {host:,.0f} GB"
    instead = "choose a smaller model, shorter trajectories (data.max_tokens), or GPUs (cluster=h100x64)"
    if predictable(p.recipe):
        try:
            found = search(replace(p.recipe, layout=replace(p.recipe.layout, search=True, fixed=[])), p.sequences)
            instead = (
                f"write layout=auto and no other layout. words; it finds {degrees(degrees_of(found.chosen.recipe))}"
            )
        except ConfigError as error:
            instead = str(error)
    raise ConfigError(f"{p.recipe.model.name} does not fit: {text}; {instead}")


def warnings(p: RunPlan) -> Iterator[str]:
    """What a user would want to know before it costs days."""
    r, optim, layout = p.recipe, p.recipe.optim, p.recipe.layout
    lengths, steps = p.sequences.lengths, len(p.steps)
    longest, rows = max(lengths), len(set(p.sequences.trajectory)) * optim.copies
    warmup = optim.warmup_steps if optim.warmup_fraction is None else optim.warmup_fraction * steps
    if warmup > steps / 2:
        yield f"warm-up takes {warmup:g} of {steps} steps ({warmup / steps:.0%}): the rate falls for hardly any of them"
    if optim.warmup_fraction is not None:
        yield (
            f"warmup_fraction {optim.warmup_fraction:g} wins over warmup_steps {optim.warmup_steps}, and the first step's rate "
            "is zero: that step changes nothing"
        )
    if optim.batch_size > rows:
        yield f"optim.batch_size {optim.batch_size} is more than the {rows} trajectories of an epoch: every step holds all"
    cap = layout.max_tokens_per_gpu * layout.cp
    if above := sum(n > cap for n in lengths):
        yield (
            f"{above} of {len(lengths)} sequences are over the cap of {cap:,} tokens (layout.max_tokens_per_gpu "
            f"{layout.max_tokens_per_gpu:,} x cp {layout.cp}), the longest has {longest:,}: slime runs each alone above it, in more "
            f"memory than the cap was meant to allow; write layout.max_tokens_per_gpu={round_up(-(-longest // layout.cp), 1024)}"
        )
    over = sum(n > r.model.native_context for n in lengths)
    if over and r.model.rope is Rope.unscaled:
        yield (
            f"{over} of {len(lengths)} sequences are longer than the native context of {r.model.native_context:,} tokens, with "
            f"positions unscaled (the longest {longest / r.model.native_context:.2f} times); model.rope=yarn "
            f"model.rope_factor={-(-100 * longest // r.model.native_context) / 100:g} scales them"
        )
    if p.step_seconds and sum(s["bubbles"] for s in p.step_seconds) > 0.3 * sum(
        sum(s.values()) for s in p.step_seconds
    ):
        yield "pipeline stages wait for more than 30% of the time; raise optim.batch_size, or take fewer GPUs"
    if layout.tp > r.cluster.gpus_per_node:
        yield f"tp {layout.tp} spans nodes of {r.cluster.gpus_per_node} GPUs: each layer waits for the network"
    seen = p.seen()
    if min(seen) != max(seen):
        yield f"trajectories are seen {min(seen)} to {max(seen)} times: the order of the stream decides which more often"
    twice = sum(len(set(s.trajectories)) < len(s.trajectories) for s in p.steps)
    if twice:
        yield f"{twice} of {steps} steps hold a trajectory more than once"
    host = r.cluster.host_memory_gb
    if host and p.host.total > 0.8 * host * 1e9:
        yield f"a node's host needs {p.host.total / 1e9:,.0f} of its {host:,.0f} GB"


def reasons(found: Found) -> dict[str, str]:
    """For every axis of a layout that was searched for, what the best layout with another value would cost."""
    return {
        name: "nothing else fits" if other is None else _reason(found.chosen, other, name)
        for name, other in found.other.items()
    }


def _reason(chosen: Option, other: Option, name: str) -> str:
    risk = f", {other.verdict.value}" if other.verdict is not chosen.verdict else ""
    return f"{degrees_of(other.recipe)[name]}: {other.seconds / chosen.seconds:.2f} x the time{risk}"


def summary(p: RunPlan, other: RunPlan | str) -> dict[str, Any]:
    """The plan as plain values; bytes and seconds. other: the released recipe's, or why there is none."""
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
        "warnings": [*warnings(p)],
        "alternatives": [
            {"layout": degrees_of(o.recipe), "seconds_an_epoch": o.seconds / _factor(r), "gpu_share": o.gpu_share}
            for o in (p.found.best if p.found else [])
        ],
        "released": other if isinstance(other, str) else _released(p, other),
    }  # fmt: skip


def _factor(r: Recipe) -> float:
    return calibration(r.gpu).factor


def _memory(p: RunPlan) -> dict[str, Any]:
    r = p.recipe
    totals = [s.total for s in p.memory]
    limit = memory_limit(r)
    return {
        "limit": limit, "verdict": p.verdict.value, "peak": max(totals), "peak_stage": totals.index(max(totals)),
        "stages": [asdict(s) | {"total": s.total} for s in p.memory], "expert_imbalance": IMBALANCE if r.model.experts else None,
        "host": asdict(p.host) | {"total": p.host.total, "limit": (r.cluster.host_memory_gb or 0) * 1e9 or None},
        "disk": asdict(disk(r)),
    }  # fmt: skip


def _time(p: RunPlan, epoch_flops: int) -> dict[str, Any] | None:
    """None where nothing is predicted."""
    if p.clock is None:
        return None
    r, gpus = p.recipe, world_size(p.recipe)
    seconds, hours = p.seconds, p.seconds / 3600
    assert r.gpu.bf16_tflops is not None, "predictable"
    work = 3 * epoch_flops / sum(p.sequences.lengths) * p.tokens
    names, repeats = p.step_seconds[0], p.schedule.num_steps / p.schedule.steps_per_epoch
    return {
        "calibration": calibration(r.gpu).text,
        "seconds": seconds,
        "steps": [sum(parts.values()) for parts in p.step_seconds],
        "parts": {name: repeats * sum(parts[name] for parts in p.step_seconds) for name in names},
        "tokens_per_second_per_gpu": p.tokens / seconds / gpus,
        "mfu": work / seconds / gpus / (r.gpu.bf16_tflops * 1e12),
        "gpu_hours": hours * gpus,
        "cost": hours * gpus * r.gpu.hour_price if r.gpu.hour_price is not None else None,
    }


def _gantt(p: RunPlan) -> list[dict[str, Any]]:
    """The passes of the first step's slowest pipeline, in seconds; nothing where no time is predicted."""
    if p.clock is None:
        return []
    tokens, pairs = p.loads[0]
    times = [p.clock.passes(s, tokens, pairs) for s in range(p.recipe.layout.pp)]
    forward, backward = (np.stack([np.add.reduce([*t[i].values()]) for t in times]) / _factor(p.recipe) for i in (0, 1))
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
        "seconds": other.seconds, "seconds_an_epoch": other.seconds_an_epoch, "warnings": [*warnings(other)],
        "learning_rates": other.learning_rates(),
        "speed_up": other.seconds_an_epoch / p.seconds_an_epoch if p.clock else None,
    }  # fmt: skip
