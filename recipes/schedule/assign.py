"""Assignment inside one step: ranks, micro-batches and their order, chosen so that the step ends soonest.

Without a pipeline a step takes as long as its busiest rank, so ranks are balanced by cost. In a pipeline a micro-batch waits
for its neighbours. Many micro-batches of similar size run best if they grow and then shrink. A search with the exact simulation
of `pipeline.py` improves this order. The result is a pure function of its arguments: a number of rounds limits the search, not
a time.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from recipes.errors import ConfigError
from recipes.layout import round_up
from recipes.schedule.pipeline import Pipeline

Rank = list[list[int]]  # micro-batches in running order; each is a list of sequences
_NEIGHBOURS = 48  # variants that one round of the search tries
_PATIENCE = 25  # rounds without an improvement after which the search ends


def assign(
    costs: Sequence[float],
    fits: Callable[[Sequence[int]], bool],
    dp: int,
    pipeline: Pipeline,
    multiple: int,
    rounds: int,
) -> list[Rank]:
    """Return every rank's micro-batches of the sequences 0 to n-1. All ranks get equally many, a multiple of `multiple`.

    costs: for every sequence, the cost of a forward pass over the whole model. fits: returns whether sequences may share a
    micro-batch; a single sequence always fits. rounds: limit of the search; it only runs with a pipeline. Raise `ConfigError`
    if there are fewer sequences than micro-batches are needed.
    """
    if pipeline.stages == 1:
        return _packed(_balanced(costs, dp), costs, fits, multiple)
    # A rank's costliest sequence passes through all stages in turn. Each further sequence only adds its time on one stage.
    spread = _spread(_dealt(costs, dp, 1 / pipeline.stages), costs, fits, multiple)
    return _searched(spread, costs, fits, pipeline, rounds)


def _balanced(costs: Sequence[float], dp: int) -> list[list[int]]:
    """Return the sequences of every rank, with the largest load reduced by moves and swaps."""
    ranks = _dealt(costs, dp, 1.0)
    load = [sum(costs[s] for s in rank) for rank in ranks]
    # A difference of a thousandth of the mean cannot be measured.
    while max(load) > 1.001 * sum(load) / dp and _improved(ranks, load, costs):
        pass
    return ranks


def _dealt(costs: Sequence[float], dp: int, further: float) -> list[list[int]]:
    """Return the sequences of every rank, dealt costliest first to the rank with the smallest load so far.

    The first sequence of a rank counts with its whole cost. Each further one counts with the share `further` of its cost.
    """
    ranks: list[list[int]] = [[] for _ in range(dp)]
    load = [0.0] * dp
    for s in sorted(range(len(costs)), key=lambda s: (-costs[s], s)):
        r = min(range(dp), key=lambda r: (bool(ranks[r]), load[r], r))
        load[r] += costs[s] * (further if ranks[r] else 1.0)
        ranks[r].append(s)
    return ranks


def _improved(ranks: list[list[int]], load: list[float], costs: Sequence[float]) -> bool:
    """Make the best move or swap between the busiest rank and another one. Return whether one lowers the larger load."""
    top = max(range(len(ranks)), key=lambda r: (load[r], -r))
    best: tuple[float, int, int, int | None] | None = None
    for other in range(len(ranks)):
        gap = load[top] - load[other]
        if other == top or gap <= 0:
            continue
        for s in ranks[top]:
            # The best amount to move is half the gap.
            for t in (None, *ranks[other]):
                moved = costs[s] - (0.0 if t is None else costs[t])
                if 0 < moved < gap and (t is not None or len(ranks[top]) > 1):
                    larger = max(load[top] - moved, load[other] + moved)
                    if best is None or larger < best[0]:
                        best = (larger, other, s, t)
    if best is None or best[0] >= load[top] * (1 - 1e-9):
        return False
    _, other, s, t = best
    ranks[top].remove(s)
    ranks[other].append(s)
    if t is not None:
        ranks[other].remove(t)
        ranks[top].append(t)
    moved = costs[s] - (0.0 if t is None else costs[t])
    load[top], load[other] = load[top] - moved, load[other] + moved
    return True


def _packed(
    ranks: list[list[int]], costs: Sequence[float], fits: Callable[[Sequence[int]], bool], multiple: int
) -> list[Rank]:
    """Pack each rank into few micro-batches by first fit decreasing, then give every rank as many as the fullest one needs."""
    packed: list[Rank] = []
    for sequences in ranks:
        bins: Rank = []
        for s in sorted(sequences, key=lambda s: (-costs[s], s)):
            for b in bins:
                if fits([*b, s]):
                    b.append(s)
                    break
            else:
                bins.append([s])
        packed.append(bins)
    return _equal(packed, costs, round_up(max(map(len, packed)), multiple))


def _spread(
    ranks: list[list[int]], costs: Sequence[float], fits: Callable[[Sequence[int]], bool], multiple: int
) -> list[Rank]:
    """Give every rank as many micro-batches as the rank with the fewest sequences can fill, growing and then shrinking."""
    count = max(multiple, min(map(len, ranks)) // multiple * multiple)
    spread: list[Rank] = []
    for sequences in ranks:
        bins = [[s] for s in sorted(sequences, key=lambda s: (costs[s], s))]
        while len(bins) > count:
            first = bins.pop(0)
            # Join it with the smallest micro-batch that has room for it.
            partner = next((b for b in bins if fits([*b, *first])), None)
            if partner is None:
                bins.append(first)
                break
            partner += first
            bins.sort(key=lambda b: (sum(costs[s] for s in b), b))
        spread.append(bins)
    spread = _equal(spread, costs, round_up(max(map(len, spread)), multiple))
    return [_mountain(bins, costs) for bins in spread]


def _mountain(bins: Rank, costs: Sequence[float]) -> Rank:
    """Return the micro-batches in an order of growing and then shrinking cost."""
    rising = sorted(bins, key=lambda b: (sum(costs[s] for s in b), b))
    return rising[::2] + rising[1::2][::-1]


def _equal(ranks: list[Rank], costs: Sequence[float], count: int) -> list[Rank]:
    """Return `count` micro-batches for every rank.

    A rank with too few sequences takes the cheapest that another rank can spare. A rank with too few micro-batches halves its
    costliest ones. Raise `ConfigError` if there are too few sequences in all.
    """
    total = sum(len(b) for rank in ranks for b in rank)
    if total < count * len(ranks):
        raise ConfigError(
            f"a step of {total} sequences cannot fill {count * len(ranks)} micro-batches ({count} on each of {len(ranks)} "
            "data-parallel ranks)",
            "give a step more sequences, or train on fewer ranks",
        )
    for rank in ranks:
        while sum(map(len, rank)) < count:
            spare = [r for r in ranks if sum(map(len, r)) > count]
            donor, at = min(
                ((r, b) for r in spare for b in range(len(r))),
                key=lambda place: min(costs[s] for s in place[0][place[1]]),
            )
            given = min(donor[at], key=lambda s: (costs[s], s))
            donor[at].remove(given)
            if not donor[at]:
                donor.pop(at)
            rank.append([given])
    for rank in ranks:
        while len(rank) < count:
            widest = max((b for b in rank if len(b) > 1), key=lambda b: (sum(costs[s] for s in b), b))
            half = widest[1::2]
            widest[:] = widest[::2]
            rank.append(half)
    return ranks


def _searched(
    ranks: list[Rank], costs: Sequence[float], fits: Callable[[Sequence[int]], bool], pipeline: Pipeline, rounds: int
) -> list[Rank]:
    """Return the ranks improved by a local search.

    Each round tries variants of one rank or of two ranks, mostly of the slowest, and takes the best one if it is better.
    """
    # Python hashes a string seed with SHA-512, so the numbers are the same on every platform and version.
    rng = random.Random("limi:assign")

    def times(variants: list[Rank]) -> np.ndarray:
        forward = np.zeros((len(variants), max(map(len, variants))))
        for row, rank in zip(forward, variants, strict=True):
            row[: len(rank)] = [sum(costs[s] for s in b) for b in rank]
        return pipeline.makespan(forward / pipeline.stages)

    now, idle = times(ranks), 0
    for _ in range(rounds):
        if (idle := idle + 1) > _PATIENCE:
            break
        slowest = int(now.argmax())
        tried: list[dict[int, Rank]] = []
        for _ in range(_NEIGHBOURS):
            variant = _variant(ranks, slowest, rng)
            if all(fits(b) for rank in variant.values() for b in rank if len(b) > 1):
                tried.append(variant)
        if not tried:
            continue
        flat = iter(times([rank for variant in tried for rank in variant.values()]))
        results = []
        for variant in tried:
            after = now.copy()
            for r in variant:
                after[r] = next(flat)
            results.append(after)
        # The mean counts a little, so that other ranks make room for the slowest one.
        best = min(range(len(tried)), key=lambda i: results[i].max() + 0.02 * results[i].mean())
        if results[best].max() + 0.02 * results[best].mean() < now.max() + 0.02 * now.mean():
            now, idle = results[best], 0
            for r, rank in tried[best].items():
                ranks[r] = rank
    return ranks


def _variant(ranks: list[Rank], slowest: int, rng: random.Random) -> dict[int, Rank]:
    """Return a random change of one rank or of two ranks. The number of micro-batches stays the same."""
    a = slowest if rng.random() < 0.8 else rng.randrange(len(ranks))
    rank_a = [[*b] for b in ranks[a]]
    i = rng.randrange(len(rank_a))
    kind = rng.random()
    if kind < 0.5 or (len(ranks) == 1 and kind < 0.75):
        j = rng.randrange(len(rank_a))
        if kind < 0.35:
            rank_a.insert(j, rank_a.pop(i))
        else:
            rank_a[i], rank_a[j] = rank_a[j], rank_a[i]
        return {a: rank_a}
    b = a if kind < 0.75 else rng.choice([r for r in range(len(ranks)) if r != a] or [a])
    rank_b = rank_a if b == a else [[*x] for x in ranks[b]]
    j = rng.randrange(len(rank_b))
    if rank_b is rank_a and i == j:
        return {a: rank_a}
    if len(rank_a[i]) > 1 and rng.random() < 0.5:
        rank_b[j].append(rank_a[i].pop(rng.randrange(len(rank_a[i]))))
    else:
        p, q = rng.randrange(len(rank_a[i])), rng.randrange(len(rank_b[j]))
        rank_a[i][p], rank_b[j][q] = rank_b[j][q], rank_a[i][p]
    return {a: rank_a, b: rank_b}
