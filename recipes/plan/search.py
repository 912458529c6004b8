"""The search behind `layout=auto`: it returns the fastest layout that fits.

First it estimates every legal combination of tp, pp (with stages of different sizes), vpp, cp, ep, etp, recomputation and
optimizer state without a schedule. Then it schedules the best ones and computes their time and memory exactly.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes.config import EngineName, Layout, OptimizerState, Recipe
from recipes.errors import ConfigError
from recipes.layout import batch_multiple, data_parallel, faults, fix, round_up, sequence_multiple, world_size
from recipes.plan.candidates import recompute_options, states_of, topologies, values_of
from recipes.plan.memory import FITS, RISKY, Load, Verdict, gpu_memory, host_memory, memory_limit, verdict
from recipes.plan.partition import Placed, placed
from recipes.plan.shown.plan_words import degrees, degrees_of
from recipes.plan.step_time import Clock, Parts
from recipes.schedule.schedule import schedule_of

EXACTLY = 24  # number of layouts that are scheduled and simulated
AXES = ("tp", "pp", "vpp", "cp", "ep", "etp", "recompute", "offload", "optimizer_state")


@dataclass(frozen=True)
class Sequences:
    """The sequences of the training data."""

    trajectory: Sequence[int]  # for every sequence, the number of its trajectory
    lengths: Sequence[int]  # for every sequence, its tokens
    source: str  # origin of the sequences, for messages


@dataclass(frozen=True)
class Option:
    """A layout with its predicted time and memory."""

    recipe: Recipe
    seconds: float  # of one epoch
    gpu_share: float  # used share of the fullest GPU's memory
    host_share: float  # used share of a node's host memory

    @property
    def verdict(self) -> Verdict:
        return verdict(max(self.gpu_share, self.host_share), 1.0)


@dataclass(frozen=True)
class Found:
    """Result of a search. All layouts in it were simulated."""

    chosen: Option  # the fastest layout that fits
    best: list[Option]  # up to ten layouts, fastest first
    other: dict[str, Option | None]  # for each axis the best layout with another value; None if none fits


class Pricing:
    """Estimates of layouts over the steps of one epoch. The steps are the same for every layout."""

    def __init__(self, r: Recipe, sequences: Sequences) -> None:
        self.sequences = sequences
        plain = schedule_of(replace(r, layout=Layout(max_tokens_per_gpu=2 * max(sequences.lengths))), *_both(sequences))
        alone = replace(plain, dp=1, rounds=0)
        self.steps = [np.array([s for b in alone.step(n).ranks[0] for s in b]) for n in range(alone.steps_per_epoch)]
        self.lengths = np.array(sequences.lengths, dtype=float)
        self.pairs = self.lengths * (self.lengths + 1) / 2
        self.longest = int(self.lengths.max())  # tokens
        self.smallest = min(map(len, self.steps))  # sequences of the smallest step
        self.tokens = int(max(self.lengths[s].sum() for s in self.steps))

    def price(self, topology: Recipe) -> Iterator[Option]:
        """Yield options with these degrees, for every recomputation and optimizer state that may be the fastest that fits.

        If none fits, yield the leanest one with infinite seconds.
        """
        where, load = placed(topology), self._load(topology)
        ladder = [
            [
                replace(
                    topology,
                    layout=replace(topology.layout, recompute=recompute, offload=offload, optimizer_state=state),
                )
                for state in states
            ]
            for recompute, offload in recompute_options(topology)
            for states in [values_of(topology, "optimizer_state", states_of(topology))]
        ]
        lean = self.shares(ladder[-1][-1], load, where)
        # Offloaded tensors may exceed the host memory although a layout with more on the GPU would fit.
        if lean[0] >= RISKY or (not ladder[-1][-1].layout.offload and lean[1] >= RISKY):
            yield Option(ladder[-1][-1], math.inf, *lean)
            return
        fits = False
        for level in ladder:
            # The order is from the fastest to the leanest, so levels after one that fits are slower. One exception: more
            # recomputation may leave room for the optimizer on the GPU.
            for r in level:
                shares = self.shares(r, load, where)
                if max(shares) < RISKY:
                    fits = True
                    yield Option(r, self._seconds(r, where), *shares)
                if max(shares) < FITS:
                    if r.layout.optimizer_state is not OptimizerState.offloaded:
                        return
                    break
        if not fits:  # the leanest level exceeds the host memory, and the others exceed the GPU's
            yield Option(ladder[-1][-1], math.inf, *lean)

    def estimate(self, r: Recipe) -> Option:
        """Return the estimate of one layout, even if it does not fit."""
        where = placed(r)
        return Option(r, self._seconds(r, where), *self.shares(r, self._load(r), where))

    def _padded(self, p: Layout) -> np.ndarray:
        pad = sequence_multiple(p)
        return np.ceil(self.lengths / pad) * pad

    def _seconds(self, r: Recipe, where: Placed) -> float:
        """Estimate the seconds of an epoch. A step takes the larger of two bounds, plus the work after the last backward pass.

        The bounds: work and waiting of the busiest stage; the longest sequence alone on all stages.
        """
        p, clock, padded = r.layout, Clock(r, where), self._padded(r.layout)
        times = {s: _total(*clock.passes(s, padded, self.pairs)) for s in clock.rates}
        busiest = max(times.values(), key=lambda one: float(one.sum()))
        through = np.add.reduce([times[s] for s in where.kind])
        seconds = 0.0
        for step in self.steps:
            mean = busiest[step].sum() / len(step)
            filled = len(step) / data_parallel(r) * mean + (p.pp - 1) / p.vpp * mean
            seconds += max(filled, through[step].max()) + sum(clock.after.values())
        return float(seconds)

    def shares(self, r: Recipe, load: Load, where: Placed) -> tuple[float, float]:
        """Return the used shares of the fullest GPU's memory and of a node's host memory."""
        gpu = max(s.total for s in gpu_memory(r, load, where)) / memory_limit(r)
        host = r.cluster.host_memory_gb
        return gpu, host_memory(r, load, self.tokens, where).total / (host * 1e9) if host else 0.0

    def _load(self, r: Recipe) -> Load:
        """Return an upper bound of a rank's micro-batches in a step."""
        padded = self._padded(r.layout)
        if r.layout.pp == 1:
            return Load([[r.layout.max_tokens_per_gpu * r.layout.cp]])
        batches = max(1, max(map(len, self.steps)) // data_parallel(r))
        worst = max((np.sort(padded[s])[::-1][:batches] for s in self.steps), key=lambda x: x[: r.layout.pp].sum())
        multiple = batch_multiple(r.layout, r.engine.name)
        return Load([[round_up(int(n), multiple) for n in worst]])


def _total(forward: Parts, backward: Parts) -> np.ndarray:
    """Return the seconds of each micro-batch, summed over all parts of both passes."""
    return np.add.reduce([*forward.values(), *backward.values()])


def _both(sequences: Sequences) -> tuple[Sequence[int], Sequence[int]]:
    return sequences.trajectory, sequences.lengths


def exact(r: Recipe, pricing: Pricing) -> Option:
    """Return the layout's time and memory, from an epoch's steps scheduled and simulated.

    Raise `ConfigError` if the steps cannot be spread over the ranks.
    """
    schedule = replace(schedule_of(r, *_both(pricing.sequences)), rounds=0)
    where = placed(r)
    clock = Clock(r, where)
    seconds, gpu, host = 0.0, 0.0, 0.0
    for number in range(schedule.steps_per_epoch):
        tokens, pairs = schedule.loads(schedule.step(number))
        seconds += sum(clock.step(tokens, pairs).values())
        here, host = pricing.shares(r, Load(tokens.tolist()), where)
        gpu = max(gpu, here)
    return Option(r, seconds, gpu, host)


def search(r: Recipe, sequences: Sequences) -> Found:
    """Return the fastest layout that fits, or the fastest risky one if none fits safely.

    Raise `ConfigError` if none fits. The error names the leanest layout and a cluster on which the model fits.
    """
    pricing = Pricing(r, sequences)
    options = [o for one in topologies(r, pricing.longest, pricing.smallest) for o in pricing.price(one)]
    if not options:
        raise _none_legal(r, pricing)
    best = _simulated(options, pricing, EXACTLY)
    if not best:
        raise _too_large(r, sequences, options)
    return Found(best[0], best[:10], {name: _other(name, options, best, pricing) for name in _free(r)})


def _free(r: Recipe) -> list[str]:
    """Return the layout fields that the search may change."""
    experts = ("ep", "etp") if not r.model.experts else ()
    offload = ("offload",) if r.engine.name is not EngineName.megatron else ()
    return [a for a in AXES if a not in (*experts, *offload, *r.layout.fixed)]


def _other(name: str, options: list[Option], best: list[Option], pricing: Pricing) -> Option | None:
    """Return the fastest layout that fits in memory and differs from the chosen one on this axis, or None."""
    chosen_value = getattr(best[0].recipe.layout, name)
    unlike = [o for o in options if getattr(o.recipe.layout, name) != chosen_value]
    if name in ("recompute", "offload", "optimizer_state"):
        # The search skips slower options with the same degrees, so they are estimated here.
        for option in best[:3]:
            p = option.recipe.layout
            for (recompute, offload), state in itertools.product(
                recompute_options(option.recipe), states_of(option.recipe)
            ):
                changed = replace(p, recompute=recompute, offload=offload, optimizer_state=state)
                others = {"recompute", "optimizer_state"} - {name}
                if getattr(changed, name) != chosen_value and all(getattr(changed, n) == getattr(p, n) for n in others):
                    unlike.append(pricing.estimate(replace(option.recipe, layout=changed)))
    return next(iter(_simulated(unlike, pricing, EXACTLY // len(AXES))), None)


def _simulated(options: list[Option], pricing: Pricing, most: int) -> list[Option]:
    """Return the best `most` options that fit, simulated exactly, fastest first.

    If none fits safely, accept a risk: first of the host memory, then of the GPU memory, then of both.
    """
    for gpu, host in itertools.product((FITS, RISKY), repeat=2):
        within = sorted((o for o in options if o.gpu_share < gpu and o.host_share < host), key=lambda o: o.seconds)
        found = []
        for option in within[:most]:
            # Skip a layout whose steps cannot be spread over its ranks.
            with contextlib.suppress(ConfigError):
                found.append(exact(option.recipe, pricing))
        if kept := [o for o in found if o.gpu_share < gpu and o.host_share < host]:
            return sorted(kept, key=lambda o: o.seconds)
    return []


def _none_legal(r: Recipe, pricing: Pricing) -> ConfigError:
    """Return the error for the case that no layout is legal.

    Its causes: the fixed values break a rule, the cap is too small, or a step has too few sequences.
    """
    fixed = " ".join(
        f"layout.{name}={getattr(getattr(r.layout, name), 'value', getattr(r.layout, name))}" for name in r.layout.fixed
    )
    plain = replace(r.layout, search=False)
    if "sp" not in r.layout.fixed:
        plain = replace(plain, sp=plain.tp > 1)
    plain_recipe = replace(r, layout=plain)
    if (wrong := next(faults(plain_recipe), None)) is not None and r.layout.fixed:
        return ConfigError(f"layout=auto with {fixed}: {wrong.problem}", fix(plain_recipe))
    cap = r.layout.max_tokens_per_gpu
    if "max_tokens_per_gpu" in r.layout.fixed and cap * world_size(r) < pricing.longest:
        return ConfigError(
            f"no cp lets layout.max_tokens_per_gpu={cap} hold the longest sequence of {pricing.longest:,} tokens",
            f"leave it out, or write layout.max_tokens_per_gpu={-(-pricing.longest // world_size(r))}",
        )
    return ConfigError(
        f"no layout of {world_size(r)} GPUs runs steps of {pricing.smallest} sequences{f' with {fixed}' if fixed else ''}",
        f"{'leave out some of these, or ' if fixed else ''}raise optim.batch_size",
    )


def _too_large(r: Recipe, sequences: Sequences, options: list[Option]) -> ConfigError:
    """Return the error that says what the leanest layout needs, and on which cluster a layout fits."""
    leanest = min(options, key=lambda o: max(o.gpu_share, o.host_share))
    where = f"{leanest.gpu_share:.0%} of a GPU's {memory_limit(r) / 1e9:.1f} GB"
    if r.cluster.host_memory_gb:
        where += f" and {leanest.host_share:.0%} of a node's {r.cluster.host_memory_gb:,.0f} GB"
    text = (
        f"{r.model.name} with sequences of {max(sequences.lengths):,} tokens does not fit {world_size(r)} x {r.gpu.name}: the "
        f"leanest layout ({degrees(degrees_of(leanest.recipe))}) takes {where}"
    )
    for more, words in _larger(r):
        pricing = Pricing(more, sequences)
        if any(
            o.verdict is Verdict.fits
            for one in topologies(more, pricing.longest, pricing.smallest)
            for o in pricing.price(one)
        ):
            return ConfigError(text, f"it fits with {words}")
    return ConfigError(text, "choose a smaller model or shorter trajectories (data.max_tokens)")


def _larger(r: Recipe) -> Iterator[tuple[Recipe, str]]:
    """Yield recipes with larger clusters (more nodes, or nodes of eight GPUs instead of one), with their overrides."""
    if r.cluster.gpus_per_node == 1:
        for nodes in (1, 2, 4, 8):
            cluster = replace(r.cluster, nodes=nodes, gpus_per_node=8, host_memory_gb=2048.0)
            yield (
                replace(r, cluster=cluster),
                f"cluster.nodes={nodes} cluster.gpus_per_node=8 cluster.host_memory_gb=2048",
            )
        return
    for nodes in range(r.cluster.nodes + 1, 9 * r.cluster.nodes):
        if nodes < 5 or nodes % r.cluster.nodes == 0:
            yield replace(r, cluster=replace(r.cluster, nodes=nodes)), f"cluster.nodes={nodes}"
