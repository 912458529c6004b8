"""The plan of a recipe on its cluster, before a GPU is used: steps, memory, time, cost and warnings.

The module imports neither torch nor ray. `plan_summary.py` writes the plan as `plan.json`; `plan_table.py` and `plan_page.py`
show it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe, Rope
from recipes.context import check_context
from recipes.errors import ConfigError, sentence
from recipes.layout import check_layout, divisor, round_up
from recipes.plan.memory import (
    FITS,
    HostMemory,
    Load,
    StageMemory,
    Verdict,
    gpu_memory,
    host_memory,
    memory_limit,
    verdict,
)
from recipes.plan.published import calibration
from recipes.plan.search import Found, Sequences, search
from recipes.plan.shown.plan_words import degrees, degrees_of, gigabytes
from recipes.plan.step_time import Clock, predictable
from recipes.schedule.learning_rate import learning_rate
from recipes.schedule.schedule import Schedule, Step, schedule_of

LARGE_LR = 1e-2  # a larger peak learning rate is warned of
MOST_WAITING = 0.3  # share of idle time of pipeline stages; more is warned of


@dataclass(frozen=True)
class RunPlan:
    """A recipe with a chosen layout, and the sequences it trains on."""

    recipe: Recipe
    sequences: Sequences
    found: Found | None  # result of the layout search; None if the layout was given

    @cached_property
    def schedule(self) -> Schedule:
        return schedule_of(self.recipe, self.sequences.trajectory, self.sequences.lengths)

    @cached_property
    def steps(self) -> list[Step]:
        """Steps of the whole run.

        Steps after the first epoch skip the search inside a step. The search moves sequences between micro-batches, but never
        moves a trajectory to another step.
        """
        quick = replace(self.schedule, rounds=0)
        later = range(self.schedule.steps_per_epoch, self.schedule.num_steps)
        return [*map(self.schedule.step, range(self.schedule.steps_per_epoch)), *map(quick.step, later)]

    @cached_property
    def loads(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For every step, [dp, micro-batches] padded tokens and causal pairs."""
        return [self.schedule.loads(step) for step in self.steps]

    @cached_property
    def memory(self) -> list[StageMemory]:
        """Memory of every stage, each in the step that needs most."""
        all_steps = [gpu_memory(self.recipe, Load(tokens.tolist())) for tokens, _ in self.loads]
        return [max(stage, key=lambda s: s.total) for stage in zip(*all_steps, strict=True)]

    @cached_property
    def host(self) -> HostMemory:
        """Memory of one host in the step with the largest micro-batch."""
        fullest = max((Load(tokens.tolist()) for tokens, _ in self.loads), key=lambda load: load.largest)
        return host_memory(self.recipe, fullest, int(max(tokens.sum() for tokens, _ in self.loads)))

    @property
    def verdict(self) -> Verdict:
        """The worse verdict of GPU and host memory."""
        shares = [max(s.total for s in self.memory) / memory_limit(self.recipe)]
        if host := self.recipe.cluster.host_memory_gb:
            shares.append(self.host.total / (host * 1e9))
        return verdict(max(shares), 1.0)

    @cached_property
    def clock(self) -> Clock | None:
        """The time model; None if nothing is predicted."""
        return Clock(self.recipe) if predictable(self.recipe) else None

    @cached_property
    def step_seconds(self) -> list[dict[str, float]]:
        """Calibrated seconds of the first epoch's steps, by part. Empty if nothing is predicted."""
        if self.clock is None:
            return []
        slower = 1 / calibration(self.recipe).factor
        first = self.loads[: self.schedule.steps_per_epoch]
        return [{name: slower * x for name, x in self.clock.step(*load).items()} for load in first]

    @property
    def seconds(self) -> float:
        """Seconds of the run. Later epochs train on the same sequences in another order, so they count like the first."""
        repeats = self.schedule.num_steps / self.schedule.steps_per_epoch
        return repeats * sum(sum(parts.values()) for parts in self.step_seconds)

    @property
    def tokens(self) -> int:
        """Tokens trained on in the whole run, without padding."""
        return sum(self.sequences.lengths[s] for step in self.steps for rank in step.ranks for b in rank for s in b)

    @property
    def seconds_an_epoch(self) -> float:
        """Seconds for as many tokens as the data has. It makes runs with different numbers of steps comparable."""
        return self.seconds * sum(self.sequences.lengths) / self.tokens

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every step."""
        steps = len(self.steps)
        return [learning_rate(self.recipe.optim, n, steps) for n in range(steps)]

    def seen(self) -> list[int]:
        """Return how often each trajectory is trained on."""
        counts = dict.fromkeys(self.sequences.trajectory, 0)
        for step in self.steps:
            for trajectory in step.trajectories:
                counts[trajectory] += 1
        return [*counts.values()]


def make_plan(r: Recipe, sequences: Sequences) -> RunPlan:
    """Return the plan of a recipe. With `layout=auto` it searches for the layout.

    Raise `ConfigError` if the recipe cannot run on these sequences.
    """
    longest = max(sequences.lengths)
    check_context(r.model, longest)
    found = None
    if r.layout.search:
        if not predictable(r):
            raise ConfigError(
                "layout=auto compares predicted times, and nothing is predicted for a CPU",
                "write layout=data_parallel, or cluster=h100x8",
            )
        found = search(r, sequences)
        r = found.chosen.recipe
    return RunPlan(r, sequences, found)


def released(p: RunPlan) -> RunPlan | str:
    """Return the plan of the public LIMI recipe of this model on the same cluster and data, or why there is none."""
    r = p.recipe
    size = [f"cluster.nodes={r.cluster.nodes}", f"cluster.gpus_per_node={r.cluster.gpus_per_node}"]
    try:
        public = compose_recipe([f"model={r.model.name}", "experiment=released", f"cluster={r.cluster.name}", *size])
        public = replace(public, cluster=r.cluster, gpu=r.gpu, engine=r.engine, data=r.data)
        check_layout(public)
        made = make_plan(public, p.sequences)
        made.schedule.check()
    except ConfigError as error:
        return str(error)
    return made


def refuse_too_large(p: RunPlan) -> None:
    """Raise `ConfigError` if the plan does not fit, with a layout or cluster that fits."""
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
    raise ConfigError(f"{p.recipe.model.name} does not fit: {text}", instead)


class Oddity(NamedTuple):
    """A warning about a plan: something unusual that can still be intended."""

    name: str  # what it is about
    problem: str  # the value and the limit
    fix: str  # the override that removes it

    def __str__(self) -> str:
        return sentence(self.problem, self.fix)


def warnings(p: RunPlan) -> Iterator[Oddity]:
    """Yield what a user should know before the run starts."""
    yield from _of_rates(p)
    yield from _of_sequences(p)
    yield from _of_steps(p)
    yield from _of_machines(p)


def _of_rates(p: RunPlan) -> Iterator[Oddity]:
    optim, rates = p.recipe.optim, p.learning_rates()
    steps, highest, fraction = len(rates), max(rates), optim.warmup_fraction
    warmup = optim.warmup_steps if fraction is None else fraction * steps
    if warmup > steps / 2:
        never = (
            f"the highest rate is {highest:.3g}, in step {rates.index(highest) + 1}, and never optim.lr {optim.lr:g}"
        )
        yield Oddity(
            "learning rate",
            f"warm-up takes {warmup:g} of {steps} steps ({warmup / steps:.0%}), more than half: "
            f"{never if highest < optim.lr else 'the rate falls for hardly any of them'}",
            f"write optim.warmup_steps={steps // 10}{'' if fraction is None else ' optim.warmup_fraction=null'}",
        )
    if fraction is not None:
        yield Oddity(
            "warm-up",
            f"warmup_fraction {fraction:g} wins over warmup_steps {optim.warmup_steps}, and the first step's rate "
            "is zero: that step changes no weight",
            "write optim.warmup_fraction=null",
        )
    if optim.lr > LARGE_LR:
        yield Oddity(
            "learning rate",
            f"optim.lr {optim.lr:g} is over {LARGE_LR:g}: it moves every weight by about as much in each step, which is more than "
            "the weights themselves",
            "write optim.lr=1e-5",
        )


def _of_sequences(p: RunPlan) -> Iterator[Oddity]:
    r, layout, lengths = p.recipe, p.recipe.layout, p.sequences.lengths
    longest, cap = max(lengths), layout.max_tokens_per_gpu * layout.cp
    if above := sum(n > cap for n in lengths):
        yield Oddity(
            "micro-batches",
            f"{above} of {len(lengths)} sequences are over the cap of {cap:,} tokens (layout.max_tokens_per_gpu "
            f"{layout.max_tokens_per_gpu:,} x cp {layout.cp}), the longest has {longest:,}: slime runs each of them alone, with more "
            "memory than the cap allows",
            f"write layout.max_tokens_per_gpu={round_up(-(-longest // layout.cp), 1024)}",
        )
    over = sum(n > r.model.native_context for n in lengths)
    if over and r.model.rope is Rope.unscaled:
        yield Oddity(
            "positions",
            f"{over} of {len(lengths)} sequences are longer than the native context of {r.model.native_context:,} tokens, with "
            f"positions unscaled (the longest {longest / r.model.native_context:.2f} times)",
            f"write model.rope=yarn model.rope_factor={-(-100 * longest // r.model.native_context) / 100:g}, which scales them",
        )


def _of_steps(p: RunPlan) -> Iterator[Oddity]:
    optim, seen = p.recipe.optim, p.seen()
    rows = len(set(p.sequences.trajectory)) * optim.copies
    if optim.batch_size > rows:
        yield Oddity(
            "batch size",
            f"optim.batch_size {optim.batch_size} is more than the {rows} trajectories of an epoch: every step holds all",
            f"write optim.batch_size={rows} or less",
        )
    if min(seen) != max(seen):
        yield Oddity(
            "repetitions",
            f"trajectories are seen {min(seen)} to {max(seen)} times, depending on the order of the stream",
            "write optim.sampling=epochs",
        )
    if twice := sum(len(set(s.trajectories)) < len(s.trajectories) for s in p.steps):
        yield Oddity(
            "repetitions",
            f"{twice} of {len(p.steps)} steps hold a trajectory more than once",
            "write optim.copies=1 optim.sampling=epochs",
        )


def _of_machines(p: RunPlan) -> Iterator[Oddity]:
    r, layout, optim = p.recipe, p.recipe.layout, p.recipe.optim
    waits = sum(s["bubbles"] for s in p.step_seconds) / max(sum(sum(s.values()) for s in p.step_seconds), 1e-9)
    if waits > MOST_WAITING:
        larger = min(2 * optim.batch_size, len(set(p.sequences.trajectory)) * optim.copies)
        fixes = [f"optim.batch_size={larger}"] * (larger > optim.batch_size)
        fixes += [f"cluster.nodes={r.cluster.nodes // 2}"] * (r.cluster.nodes > 1)
        yield Oddity(
            "pipeline",
            f"pipeline stages wait for {waits:.0%} of the time, more than {MOST_WAITING:.0%}",
            f"write {' or '.join(fixes or ['a smaller layout.pp'])}",
        )
    if layout.tp > (gpus := r.cluster.gpus_per_node):
        yield Oddity(
            "tensor parallel",
            f"tp {layout.tp} spans nodes of {gpus} GPUs: each layer waits for the network",
            f"write layout.tp={divisor(layout.tp, gpus)}",
        )
    host = r.cluster.host_memory_gb
    if host and p.host.total > FITS * host * 1e9:
        parts = vars(p.host)
        yield Oddity(
            "host memory",
            f"a node's host needs {gigabytes(p.host.total)} of its {gigabytes(host * 1e9)} GB, more than {FITS:.0%}",
            _LESS_HOST[max(parts, key=lambda part: parts[part])],
        )


# How to need less host memory, by its largest part.
_LESS_HOST = {
    "optimizer": "write layout.optimizer_state=resident where the GPUs have room, or a larger cluster.nodes",
    "activations": "write layout.offload=false where the GPUs have room, or a larger cluster.nodes",
    "weights_copy": "write a larger cluster.nodes, or name nodes with more memory (cluster.host_memory_gb)",
    "object_store": "write a smaller optim.batch_size",
    "processes": "name nodes with more memory (cluster.host_memory_gb)",
}
