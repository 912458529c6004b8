"""`make bench` for the assignment inside a step: this project's compared with slime's three modes, on LIMI's lengths and Qwen3-32B's
costs.

The time of a step comes from an exact 1F1B simulation, in which a backward pass takes twice as long as a forward pass. No assignment
can beat the bound: the larger of one stage's share of the work and the longest sequence. Lengths are log-normal (median 36,000, sigma
0.55), limited to 13,000 to 152,000 tokens.
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from recipes.compose.options import choices
from recipes.compose.recipe import compose_recipe
from recipes.dimensions import Flops, flops
from recipes.paths import REPO
from recipes.schedule.lengths import drawn
from recipes.schedule.pipeline import Pipeline
from recipes.schedule.schedule import Schedule
from recipes.schedule.slime_packing import divided, first_fit

CAP = 155_648  # most tokens in a micro-batch; LIMI's longest trajectory fits
STEPS = {1: (39,), 4: (64, 71, 78)}  # pipeline stages: numbers of sequences in a step
Ranks = Sequence[Sequence[Sequence[int]]]


@cache
def model_cost() -> Flops:
    """Return Qwen3-32B's costs."""
    return flops(compose_recipe(["model=qwen3-32b"]).model)


def bound(lengths: Sequence[int], dp: int, stages: int) -> float:
    """Return a lower bound of a step's makespan."""
    costs = [3 * model_cost().sequence(n) for n in lengths]
    return max(sum(costs) / dp / stages, *costs)


def makespan(ranks: Ranks, lengths: Sequence[int], stages: int) -> float:
    """Return the makespan: the time until the slowest rank has finished."""
    forward = np.zeros((len(ranks), max(map(len, ranks))))
    for row, rank in zip(forward, ranks, strict=True):
        row[: len(rank)] = [model_cost().batch([lengths[s] for s in b]) for b in rank]
    return float(Pipeline(stages).makespan(forward / stages).max())


def schedule_of(lengths: Sequence[int], dp: int, stages: int, batch_size: int) -> Schedule:
    """Return this project's schedule of one epoch."""
    return Schedule(
        trajectory=range(len(lengths)), lengths=lengths, costs=[model_cost().sequence(n) for n in lengths], batch_size=batch_size,
        epochs=1, seed=0, dp=dp, max_tokens=CAP, pipeline=Pipeline(stages),
    )  # fmt: skip


def seconds_of(lengths: Sequence[int], dp: int, stages: int) -> float:
    """Return the makespan of one step with these lengths under this project's assignment."""
    step = schedule_of(lengths, dp, stages, len(lengths)).step(0)
    return makespan(step.ranks, lengths, stages)


def assignment_rows(seeds: int = 20) -> Iterator[tuple[str, ...]]:
    """Yield one row per layout: the mean and the worst ratio of makespan to bound, and the number of micro-batches over the cap."""
    for stages, dps in ((1, (2, 4, 8)), (4, (1, 2, 4))):
        for dp in dps:
            steps = [drawn(n, seed) for n in STEPS[stages] for seed in range(seeds)]
            ours = [seconds_of(one, dp, stages) / bound(one, dp, stages) for one in steps]
            cells = [f"PP {stages}, DP {dp}", f"{statistics.mean(ours):.3f}, {max(ours):.3f}"]
            for mode in SLIME:
                packed = [slime(one, dp, mode) for one in steps]
                ratios = [
                    makespan(p, one, stages) / bound(one, dp, stages) for p, one in zip(packed, steps, strict=True)
                ]
                over = sum(
                    sum(one[s] for s in b) > CAP
                    for p, one in zip(packed, steps, strict=True)
                    for rank in p
                    for b in rank
                )
                cells.append(
                    f"{statistics.mean(ratios):.3f}, {max(ratios):.3f}" + (f"; {over} over the cap" if over else "")
                )
            yield (*cells, "PP 1: mean 1.01, worst 1.05" if stages == 1 else "mean of the three 1.20")


def planning_rows() -> Iterator[tuple[str, str]]:
    """Yield the seconds to plan all steps of an epoch of 10,000 sequences."""
    lengths = drawn(10_000, 0)
    for batch_size in (64, 256):
        for stages, dp in ((1, 8), (4, 4)):
            started = time.perf_counter()
            schedule = schedule_of(lengths, dp, stages, batch_size)
            for number in range(schedule.num_steps):
                schedule.step(number)
            yield (
                f"10,000 sequences, steps of {batch_size}, PP {stages}, DP {dp}",
                f"{time.perf_counter() - started:.2f} s",
            )


def command_rows() -> Iterator[tuple[str, str]]:
    """Yield the seconds of whole `make plan` commands, for the six real models on every GPU cluster. A command ends early if its model
    cannot fit."""
    models = [model for model in choices("model") if "tiny" not in model]
    clusters = [cluster for cluster in choices("cluster") if cluster != "local"]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for model, cluster in itertools.product(models, clusters):
            command = [
                sys.executable,
                "launch/limi.py",
                "plan",
                f"model={model}",
                f"cluster={cluster}",
                f"cluster.root={root}",
            ]
            started = time.perf_counter()
            done = subprocess.run(command, cwd=REPO, capture_output=True, check=False)
            seconds[f"{model} on {cluster}"] = time.perf_counter() - started
            if done.returncode not in (0, 2):
                raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.decode()}")
    slowest = max(seconds, key=lambda name: seconds[name])
    yield f"`make plan`, median of {len(seconds)}", f"{statistics.median(seconds.values()):.2f} s"
    yield f"`make plan`, the slowest, {slowest}", f"{seconds[slowest]:.2f} s"


SLIME = ("default", "balance_data", "balance_by_flops")


def slime(lengths: Sequence[int], dp: int, mode: str) -> list[list[list[int]]]:
    """Assign sequences to ranks and micro-batches by slime's rules (`dp_schedule.py` at 624b824): pack into bins, split bins until
    their number is a multiple of the ranks, then distribute.

    default: first fit under the cap in order of arrival, distributed round-robin. balance_data: the same bins, distributed by
    Karmarkar-Karp on cost, equally many per rank. balance_by_flops: as many bins as the tokens need, filled by Karmarkar-Karp on cost
    without any cap.
    """
    costs = [model_cost().sequence(n) for n in lengths]
    if mode == "balance_by_flops":
        bins = _karmarkar_karp(costs, max(1, -(-sum(lengths) // CAP)), equal=False)
    else:
        bins = first_fit(lengths, CAP)
    bins = divided(bins, lengths, dp)
    if mode == "default":
        return [bins[r::dp] for r in range(dp)]
    loads = [sum(costs[i] for i in b) for b in bins]
    return [[bins[i] for i in sorted(rank)] for rank in _karmarkar_karp(loads, dp, equal=True)]


def _karmarkar_karp(values: Sequence[float], parts: int, equal: bool) -> list[list[int]]:
    """Partition indices by the largest differencing method (Karmarkar and Karp 1982). equal: every part gets as many."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups = [order[i : i + parts] for i in range(0, len(order), parts)] if equal else [[i] for i in order]
    states: list[list[tuple[float, list[int]]]] = []
    for group in groups:
        state: list[tuple[float, list[int]]] = [(values[i], [i]) for i in group]
        states.append(_falling(state + [(0.0, [])] * (parts - len(group))))
    while len(states) > 1:
        states.sort(key=lambda s: s[0][0] - s[-1][0])
        one, other = states.pop(), states.pop()
        states.append(_falling([(a[0] + b[0], a[1] + b[1]) for a, b in zip(one, reversed(other), strict=True)]))
    return [items for _, items in states[0]]


def _falling(state: list[tuple[float, list[int]]]) -> list[tuple[float, list[int]]]:
    return sorted(state, key=lambda part: -part[0])
