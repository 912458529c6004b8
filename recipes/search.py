"""`layout=auto`: the fastest layout that fits.

Every legal combination of tp, pp (with stages of unlike size), vpp, cp, ep, etp, recomputation and optimizer state is estimated
without a schedule; the best of them are then scheduled, simulated and weighed exactly.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes.config import EngineName, Layout, OptimizerState, Recipe, Recompute
from recipes.errors import ConfigError
from recipes.layout import batch_multiple, data_parallel, faults, round_up, sequence_multiple, world_size
from recipes.memory import FITS, RISKY, Load, Verdict, gpu_memory, host_memory, memory_limit, verdict
from recipes.schedule import schedule_of
from recipes.step_time import Clock, Parts

EXACTLY = 24  # layouts that are scheduled and simulated
CAP_MULTIPLE = 1024  # of a micro-batch's cap
VPPS = (1, 2, 4)
AXES = ("tp", "pp", "vpp", "cp", "ep", "etp", "recompute", "optimizer_state")


@dataclass(frozen=True)
class Sequences:
    """What is trained on: for every sequence its trajectory's number and its tokens; where these come from."""

    trajectory: Sequence[int]
    lengths: Sequence[int]
    source: str


@dataclass(frozen=True)
class Option:
    """A layout with its seconds of an epoch, its share of the fullest GPU's memory and of a node's host memory."""

    recipe: Recipe
    seconds: float
    gpu_share: float
    host_share: float

    @property
    def verdict(self) -> Verdict:
        return verdict(max(self.gpu_share, self.host_share), 1.0)


@dataclass(frozen=True)
class Found:
    """chosen: the fastest that fits. best: up to ten layouts, fastest first. other: for each axis the best one with another
    value, None where none fits; all as simulated."""

    chosen: Option
    best: list[Option]
    other: dict[str, Option | None]


class Pricing:
    """Bounds of a layout over one epoch's steps, which are the same for every layout."""

    def __init__(self, r: Recipe, sequences: Sequences) -> None:
        self.sequences = sequences
        plain = schedule_of(replace(r, layout=Layout(max_tokens_per_gpu=2 * max(sequences.lengths))), *_both(sequences))
        alone = replace(plain, dp=1, rounds=0)
        self.steps = [np.array([s for b in alone.step(n).ranks[0] for s in b]) for n in range(alone.steps_per_epoch)]
        self.lengths = np.array(sequences.lengths, dtype=float)
        self.pairs = self.lengths * (self.lengths + 1) / 2
        self.smallest = min(map(len, self.steps))
        self.tokens = int(max(self.lengths[s].sum() for s in self.steps))

    def price(self, topology: Recipe) -> Iterator[Option]:
        """The degrees of a layout with the recomputation and optimizer state that cost least among those that fit."""
        ladder = [
            replace(topology, layout=replace(topology.layout, recompute=recompute, optimizer_state=state))
            for recompute in _of(topology, "recompute", [*Recompute])
            for state in _of(topology, "optimizer_state", _states(topology))
        ]
        padded = np.ceil(self.lengths / (pad := sequence_multiple(topology.layout))) * pad
        load = self._load(topology, padded)
        lean = self.shares(ladder[-1], load)
        if max(lean) >= RISKY:
            yield Option(ladder[-1], math.inf, *lean)
            return
        # From the fastest to the leanest: what comes after one that fits is slower.
        for r in ladder:
            shares = self.shares(r, load)
            if max(shares) < RISKY:
                yield Option(r, self._seconds(r, padded), *shares)
            if max(shares) < FITS:
                return

    def _seconds(self, r: Recipe, padded: np.ndarray) -> float:
        """An estimate of an epoch's time: what the busiest stage does and waits, or the longest sequence on its own."""
        p, clock = r.layout, Clock(r)
        times = {s: _total(*clock.passes(s, padded, self.pairs)) for s in clock.rates}
        busiest = max(times.values(), key=lambda one: float(one.sum()))
        through = np.add.reduce([times[s] for s in clock.kind])
        seconds = 0.0
        for step in self.steps:
            mean = busiest[step].sum() / len(step)
            filled = len(step) / data_parallel(r) * mean + (p.pp - 1) / p.vpp * mean
            seconds += max(filled, through[step].max()) + sum(clock.after.values())
        return float(seconds)

    def shares(self, r: Recipe, load: Load) -> tuple[float, float]:
        """Of the fullest GPU's memory and of a node's host memory."""
        gpu = max(s.total for s in gpu_memory(r, load)) / memory_limit(r)
        host = r.cluster.host_memory_gb
        return gpu, host_memory(r, self.tokens).total / (host * 1e9) if host else 0.0

    def _load(self, r: Recipe, padded: np.ndarray) -> Load:
        if r.layout.pp == 1:
            return Load([[r.layout.max_tokens_per_gpu * r.layout.cp]])
        batches = max(1, max(map(len, self.steps)) // data_parallel(r))
        worst = max((np.sort(padded[s])[::-1][:batches] for s in self.steps), key=lambda x: x[: r.layout.pp].sum())
        multiple = batch_multiple(r.layout, r.engine.name)
        return Load([[round_up(int(n), multiple) for n in worst]])


def _total(forward: Parts, backward: Parts) -> np.ndarray:
    return np.add.reduce([*forward.values(), *backward.values()])


def _both(sequences: Sequences) -> tuple[Sequence[int], Sequence[int]]:
    return sequences.trajectory, sequences.lengths


def exact(r: Recipe, sequences: Sequences, pricing: Pricing) -> Option:
    """An epoch's steps scheduled and simulated. Raises `ConfigError` where they cannot be spread over the ranks."""
    schedule = replace(schedule_of(r, *_both(sequences)), rounds=0)
    clock = Clock(r)
    seconds, gpu, host = 0.0, 0.0, 0.0
    for number in range(schedule.steps_per_epoch):
        step = schedule.step(number)
        tokens, pairs = schedule.loads(step)
        seconds += sum(clock.step(tokens, pairs).values())
        here, host = pricing.shares(r, Load(tokens.tolist()))
        gpu = max(gpu, here)
    return Option(r, seconds, gpu, host)


def search(r: Recipe, sequences: Sequences) -> Found:
    """The fastest layout that fits, or that fits at a risk where none does. Raises `ConfigError` with the leanest one, and with
    what would make the model fit, where none does."""
    pricing = Pricing(r, sequences)
    options = [o for one in topologies(r, pricing) for o in pricing.price(one)]
    if not options:
        raise ConfigError(
            f"no layout of {world_size(r)} GPUs runs steps of {pricing.smallest} sequences with "
            f"{', '.join(f'layout.{name}={getattr(r.layout, name)}' for name in r.layout.fixed) or 'any degrees'}; leave "
            "layout. options out, or raise optim.batch_size"
        )
    best = _simulated(options, sequences, pricing, EXACTLY)
    if not best:
        raise ConfigError(_too_large(r, sequences, options))
    other = {}
    for name in AXES:
        mine = getattr(best[0].recipe.layout, name)
        unlike = [o for o in options if getattr(o.recipe.layout, name) != mine]
        if unlike:
            other[name] = next(iter(_simulated(unlike, sequences, pricing, EXACTLY // len(AXES))), None)
    return Found(best[0], best[:10], other)


def _simulated(options: list[Option], sequences: Sequences, pricing: Pricing, most: int) -> list[Option]:
    """The best `most` options that fit, or at a risk where none does; exactly, fastest first."""
    for limit in (FITS, RISKY):
        within = sorted((o for o in options if max(o.gpu_share, o.host_share) < limit), key=lambda o: o.seconds)
        found = []
        for option in within[:most]:
            # Its steps may not spread over its ranks.
            with contextlib.suppress(ConfigError):
                found.append(exact(option.recipe, sequences, pricing))
        if kept := [o for o in found if max(o.gpu_share, o.host_share) < limit]:
            return sorted(kept, key=lambda o: o.seconds)
    return []


def topologies(r: Recipe, pricing: Pricing) -> Iterator[Recipe]:
    """Every legal layout of the cluster's GPUs in which `layout.fixed` keeps its values; recomputation and optimizer state are
    left as they are."""
    for layout in _degrees(r, pricing):
        one = replace(r, layout=layout)
        if next(faults(one), None) is not None:
            continue
        yield one


def _of(r: Recipe, name: str, values: Sequence) -> list:
    """The values an axis may take: its own where the command line fixed it."""
    return [getattr(r.layout, name)] if name in r.layout.fixed else [*values]


def _states(r: Recipe) -> list[OptimizerState]:
    # Precision-aware and offloaded states are Transformer Engine's.
    slime = r.engine.name is EngineName.slime
    return [*OptimizerState] if slime else [OptimizerState.resident]


def _degrees(r: Recipe, pricing: Pricing) -> Iterator[Layout]:
    m, world = r.model, world_size(r)
    longest = int(pricing.lengths.max())
    powers = [2**i for i in range(world.bit_length()) if world % 2**i == 0]
    tps = [t for t in powers if t <= r.cluster.gpus_per_node and m.kv_heads % t == 0]
    pps = [n for n in range(1, world + 1) if world % n == 0 and n <= m.layers]
    for tp, cp, pp in itertools.product(_of(r, "tp", tps), _of(r, "cp", powers), _of(r, "pp", pps)):
        if world % (tp * cp * pp):
            continue
        dp = world // (tp * cp * pp)
        if pricing.smallest < dp:
            continue
        cap = r.layout.max_tokens_per_gpu
        if "max_tokens_per_gpu" not in r.layout.fixed:
            whole = round_up(round_up(longest, 2 * cp), batch_multiple(replace(r.layout, tp=tp, cp=cp), r.engine.name))
            cap = round_up(-(-whole // cp), CAP_MULTIPLE)
        base = replace(
            r.layout, search=False, tp=tp, sp=tp > 1 if "sp" not in r.layout.fixed else r.layout.sp, cp=cp, pp=pp,
            dp=None, max_tokens_per_gpu=cap, loss_chunk=r.layout.loss_chunk if r.engine.name is EngineName.slime else None,
        )  # fmt: skip
        for (first, last), vpp in itertools.product(_splits(r, pp), _of(r, "vpp", VPPS)):
            if vpp > 1 and (pp == 1 or pricing.smallest < pp * dp):
                continue
            for ep, etp in _expert_degrees(r, world // pp, tp):
                yield replace(base, first_stage_layers=first, last_stage_layers=last, vpp=vpp, ep=ep, etp=etp)


def _splits(r: Recipe, pp: int) -> list[tuple[int | None, int | None]]:
    """Layers of the first and the last stage: alike, or the last with fewer, as it also has the output layer."""
    fixed = {"first_stage_layers", "last_stage_layers"} & {*r.layout.fixed}
    if fixed or pp == 1:
        return [(r.layout.first_stage_layers, r.layout.last_stage_layers)]
    layers = r.model.layers
    splits: list[tuple[int | None, int | None]] = [(None, None)] if layers % pp == 0 else []
    for others in range(layers // pp, layers // pp + 3):
        if 0 < (last := layers - others * (pp - 1)) < others:
            splits.append((None, last))
        ends = layers - others * (pp - 2)
        if pp > 2 and 0 < ends // 2 < others:
            splits.append((ends - ends // 2, ends // 2))
    return splits


def _expert_degrees(r: Recipe, ranks: int, tp: int) -> list[tuple[int, int]]:
    if not r.model.experts:
        return [(r.layout.ep, r.layout.etp)]
    eps = [e for e in range(1, ranks + 1) if ranks % e == 0 and r.model.experts % e == 0]
    return [
        (ep, etp)
        for ep, etp in itertools.product(_of(r, "ep", eps), _of(r, "etp", (1, tp) if tp > 1 else (1,)))
        if ranks % (ep * etp) == 0
    ]


def _too_large(r: Recipe, sequences: Sequences, options: list[Option]) -> str:
    """What the leanest layout lacks, and the number of nodes with which one fits."""
    leanest = min(options, key=lambda o: max(o.gpu_share, o.host_share))
    p = leanest.recipe.layout
    where = (
        f"{leanest.gpu_share:.0%} of a GPU's {memory_limit(r) / 2**30:.0f} GiB and {leanest.host_share:.0%} of a node's "
        f"{r.cluster.host_memory_gb:,.0f} GB"
        if r.cluster.host_memory_gb
        else f"{leanest.gpu_share:.0%} of the memory"
    )
    text = (
        f"{r.model.name} with sequences of {max(sequences.lengths):,} tokens does not fit {world_size(r)} x {r.gpu.name}: the "
        f"leanest layout (tp {p.tp}, pp {p.pp}, cp {p.cp}, ep {p.ep}, recompute {p.recompute.value}, optimizer "
        f"{p.optimizer_state.value}) takes {where}"
    )
    for nodes in (2, 4, 8, 16, 32):
        more = replace(r, cluster=replace(r.cluster, nodes=r.cluster.nodes * nodes))
        pricing = Pricing(more, sequences)
        if any(o.verdict is Verdict.fits for one in topologies(more, pricing) for o in pricing.price(one)):
            return f"{text}; it fits with cluster.nodes={more.cluster.nodes}"
    return f"{text}; choose a smaller model or shorter trajectories (data.max_tokens)"
