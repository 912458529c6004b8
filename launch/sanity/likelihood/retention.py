"""The retention curve: held-out loss of the trained weights and the base's, as a whole, by turn and by position."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from launch.sanity.likelihood.bootstrap import LEVEL, Mean, Resampled, resampled
from launch.sanity.likelihood.scores import Scores

ENOUGH = 5  # fewest trajectories for which a part is judged
# First position or turn of each part; the last part is open-ended. 155,648 is the longest context that the recipes train.
POSITIONS = (0, *(1024 << n for n in range(8)), 155_648)
TURNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 65, 129)


@dataclass(frozen=True)
class Part:
    """A part of the supervised tokens, e.g. those of some turns or positions.

    first, end: range of its turns or positions, end excluded; end is None for the open-ended part. trained, base, difference: mean
    nats per token. least: lower bound of the difference at a level that all judged parts of the curve share; None if not judged.
    """

    name: str
    first: int
    end: int | None
    tokens: int
    trajectories: int
    trained: Mean
    base: Mean | None
    difference: Mean | None
    least: float | None


@dataclass(frozen=True)
class Retention:
    """Comparison over the tokens that have a score from all measured weights.

    whole: None if no token has one. lost: number of tokens without a score from the trained weights, and from the base's (None if
    the base was not measured).
    """

    whole: Part | None
    turns: list[Part]
    positions: list[Part]
    lost: tuple[int, int | None]


def compare(trained: Scores, base: Scores | None) -> Retention:
    """Compare the trained weights' scores with the base's on the same data set. base: None if it was not measured."""
    scored = np.isfinite(trained.nll)
    if base is not None:
        scored &= np.isfinite(base.nll)
    columns = [trained.nll[scored]]
    if base is not None:
        columns += [base.nll[scored], trained.nll[scored] - base.nll[scored]]
    nll, trajectory = np.stack(columns, 1), trained.trajectory[scored]
    by_turn = _curve(nll, trajectory, trained.turn[scored], TURNS, [*_turn_names()])
    by_position = _curve(nll, trajectory, trained.position[scored], POSITIONS, [*_position_names()])
    whole = _curve(nll, trajectory, np.zeros(len(nll), int), (0,), ["all"])
    lost = len(trained.lost), None if base is None else len(base.lost)
    return Retention(whole[0] if whole else None, by_turn, by_position, lost)


def _turn_names() -> list[str]:
    ends = [*TURNS[1:], None]
    names = []
    for first, end in zip(TURNS, ends, strict=True):
        names.append(f"{first} and more" if end is None else str(first) if end == first + 1 else f"{first}–{end - 1}")
    return names


def _position_names() -> list[str]:
    sizes = [f"{p // 1024}k" if p else "0" for p in POSITIONS]
    return [*(f"{a}–{b}" for a, b in pairwise(sizes)), f"{sizes[-1]} and more"]


def _curve(
    nll: np.ndarray, trajectory: np.ndarray, at: np.ndarray, firsts: Sequence[int], names: Sequence[str]
) -> list[Part]:
    """Return the parts that have tokens.

    nll: [tokens, columns], either the trained weights' alone, or the trained weights', the base's and the difference. trajectory:
    [tokens], each token's trajectory. at: [tokens], each token's turn or position. firsts: first turn or position of each part.

    All judged parts share the level of the differences (Bonferroni correction). With 95% for each of nine parts, one good
    checkpoint in five would have a part that is surely above the base, by chance.
    """
    part = np.searchsorted(firsts, at, side="right") - 1
    found: list[tuple[int, int, int, list[Resampled]]] = []
    for number in np.unique(part):
        inside = part == number
        _, row, tokens = np.unique(trajectory[inside], return_inverse=True, return_counts=True)
        sums = np.stack([np.bincount(row, column) for column in nll[inside].T], 1)
        found.append((int(number), int(tokens.sum()), len(tokens), resampled(sums, tokens)))
    judged = sum(trajectories >= ENOUGH for _, _, trajectories, _ in found)
    ends = [*firsts[1:], None]
    parts = []
    for number, count, trajectories, seen in found:
        trained, base, difference = [r.interval() for r in seen] if len(seen) == 3 else (seen[0].interval(), None, None)
        together = seen[-1].interval(1 - (1 - LEVEL) / max(1, judged))
        least = together.low if difference and trajectories >= ENOUGH else None
        first, end = firsts[number], ends[number]
        parts.append(Part(names[number], first, end, count, trajectories, trained, base, difference, least))
    return parts


def as_json(found: Retention) -> dict[str, Any]:
    """Return the content of `likelihood.json`, in nats per supervised token.

    `base` and `difference` are null if the base was not measured.
    """
    return {
        "confidence": LEVEL,
        "without_a_score": dict(zip(("trained", "base"), found.lost, strict=True)),
        "whole": found.whole and asdict(found.whole),
        "turns": [asdict(p) for p in found.turns],
        "positions": [asdict(p) for p in found.positions],
    }
