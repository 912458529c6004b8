"""Approximate lengths of LIMI's trajectories, for plans without packed data.

The release has 78 trajectories of 13k to 152k tokens, 42.4k on average (arXiv 2509.17567). A log-normal distribution with
median 36,000 and sigma 0.55, cut at both ends, is close to it.
"""

import math
import random
from statistics import NormalDist

COUNT = 78
SHORTEST, LONGEST = 13_000, 152_000
_MEDIAN, _SIGMA = 36_000, 0.55


def drawn(count: int, seed: int) -> list[int]:
    """Return `count` random lengths in tokens."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while len(lengths) < count:
        if SHORTEST <= (length := rng.lognormvariate(math.log(_MEDIAN), _SIGMA)) <= LONGEST:
            lengths.append(round(length))
    return lengths


def quantiles(count: int = COUNT) -> list[int]:
    """Return `count` rising lengths in tokens at evenly spaced quantiles, including the shortest and the longest."""
    normal = NormalDist(math.log(_MEDIAN), _SIGMA)
    low, high = normal.cdf(math.log(SHORTEST)), normal.cdf(math.log(LONGEST))
    return [round(math.exp(normal.inv_cdf(low + (high - low) * i / (count - 1)))) for i in range(count)]
