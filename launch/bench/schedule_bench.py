"""`make bench`, the assignment inside a step: ours beside slime's three modes, on LIMI's lengths and Qwen3-32B's costs.

Time of a step: the exact 1F1B simulation, a backward pass twice a forward pass; the bound is the larger of a stage's share
of the work and the longest sequence, which no assignment can beat. Lengths are log-normal (median 36,000, sigma 0.55),
between 13,000 and 152,000 tokens.
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

CAP = 155_648  # tokens of a micro-batch: LIMI's longest trajectory fits
STEPS = {1: (39,), 4: (64, 71, 78)}  # sequences of a step, by pipeline stages
Ranks = Sequence[Sequence[Sequence[int]]]


@cache
def model_cost() -> Flops:
    return flops(compose_recipe(["model=qwen3-32b"]).model)


def bound(lengths: Sequence[int], dp: int, stages: int) -> float:
    costs = [3 * model_cost().sequence(n) for n in lengths]
    return max(sum(costs) / dp / stages, *costs)


def makespan(ranks: Ranks, lengths: Sequence[int], stages: int) -> float:
    """Of the slowest rank."""
    forward = np.zeros((len(ranks), max(map(len, ranks))))
    for row, rank in zip(forward, ranks, strict=True):
        row[: len(rank)] = [model_cost().batch([lengths[s] for s in b]) for b in rank]
    return float(Pipeline(stages).makespan(forward / stages).max())


def schedule_of(lengths: Sequence[int], dp: int, stages: int, batch_size: int) -> Schedule:
    return Schedule(
        trajectory=range(len(lengths)), lengths=lengths, costs=[model_cost().sequence(n) for n in lengths], batch_size=batch_size,
        epochs=1, seed=0, dp=dp, max_tokens=CAP, pipeline=Pipeline(stages),
    )  # fmt: skip


def seconds_of(lengths: Sequence[int], dp: int, stages: int) -> float:
    """Makespan of a step of these lengths as this project assigns it."""
    step = schedule_of(lengths, dp, stages, len(lengths)).step(0)
    return makespan(step.ranks, lengths, stages)


def assignment_rows(seeds: int = 20) -> Iterator[tuple[str, ...]]:
    """One row a layout: makespan over the bound, mean and worst; micro-batches over the cap."""
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
    """Whole `make plan` commands, of the six real models on every cluster of GPUs; one that cannot fit ends early."""
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
    """slime's rules at 624b824 (`dp_schedule.py`): pack, split to a multiple of the ranks, then deal in turn or by cost.

    default: first fit in order of arrival under the cap, dealt in turn. balance_data: dealt by Karmarkar-Karp on cost, as
    many on each rank. balance_by_flops: as many bins as the tokens need, filled by Karmarkar-Karp on cost; it looks at no
    cap.
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
    """The largest differencing method (Karmarkar and Karp 1982) for several parts, with as many in each where `equal`."""
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
