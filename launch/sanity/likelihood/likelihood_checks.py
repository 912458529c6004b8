"""Checks of the held-out loss: server compared with trainer, trained model with base, and late parts with the whole."""

from collections.abc import Sequence

from launch.checks import Check, Outcome, judged
from launch.sanity.likelihood.retention import ENOUGH, Part, Retention
from launch.sanity.likelihood.scores import Scores
from recipes.config import Dtype, Recipe


def beside_trainer(scores: Scores, whole: Part | None, trainers: float | None, recipe: Recipe) -> Check:
    """Check that the server's held-out loss equals the trainer's.

    whole: the mean over these scores. trainers: the trainer's own held-out loss of these weights, None if unknown.
    """
    s = recipe.sanity
    tolerance = s.nll_tolerance if scores.fp32 and recipe.engine.dtype is Dtype.fp32 else s.nll_tolerance_bf16
    nll = float(scores.nll.mean())  # mean over supervised tokens, like the trainer's
    lost = _without_a_score(scores)
    interval = f"{whole.trained}; {whole.tokens:,} tokens of {whole.trajectories} trajectories" if whole else ""
    by = "" if trainers is None else f", {trainers:.6f} by the trainer"
    return Check(
        "held-out loss",
        "weights that give another loss on the server than in training",
        f"{nll:.6f} by the server{by}",
        "shown; the trainer's figure is not known" if trainers is None else f"within {tolerance:g}",
        judged(not lost and (trainers is None or abs(nll - trainers) <= tolerance)),
        lost or interval,
    )


def beside_base(found: Retention, base: Scores, recipe: Recipe) -> list[Check]:
    """Return the checks against the base. found: the comparison of the trained weights' scores with the base's."""
    limit = recipe.sanity.max_above_base
    parts = {"loss by turn": found.turns, "loss by position": found.positions}
    return [
        _whole(found.whole, base, limit),
        *(_late(name, of_curve, found.whole, limit) for name, of_curve in parts.items()),
    ]


def _whole(whole: Part | None, base: Scores, limit: float) -> Check:
    """Warn if the whole held-out loss is surely above the base's.

    It is no failure: a model may be right to talk differently from the held-out trajectories.
    """
    name, protects = "held-out loss beside the base", "training that lost more than it taught"
    said = f"not surely more than {limit:g} above the base's"
    lost = _without_a_score(base)
    if whole is None or whole.base is None or whole.difference is None:
        return Check(name, protects, "no token has a score from both", said, Outcome.failed, lost)
    worse = whole.difference.low is not None and whole.difference.low > limit
    outcome = Outcome.failed if lost else Outcome.warned if worse else Outcome.passed
    figure = f"{whole.trained.mean:.4f}, the base {whole.base.mean:.4f}: {whole.difference.mean:+.4f}"
    return Check(
        name, protects, figure, said, outcome, f"by the base, {lost}" if lost else f"difference: {whole.difference}"
    )


def _late(name: str, parts: Sequence[Part], whole: Part | None, limit: float) -> Check:
    """Warn if parts are surely worse than the base's while the whole is not.

    For a checkpoint that is nowhere worse, the check warns in at most 1 of 40 cases, regardless of the number of parts: all judged
    parts share the level. Parts with fewer than `ENOUGH` trajectories are not judged.
    """
    seen = [p for p in parts if p.least is not None]
    above = [p for p in seen if p.least is not None and p.least > limit]
    worse = whole is not None and whole.difference is not None and (whole.difference.low or 0.0) > limit
    figure = f"{len(above)} of {len(seen)} parts" if seen else f"no part has {ENOUGH} trajectories"
    lines = [_told(p) for p in above]
    if above and worse:
        lines.append("the whole is worse too")
    return Check(
        name,
        "a model that got worse late in long trajectories",
        figure,
        f"none surely more than {limit:g} above the base's while the whole is not",
        Outcome.warned if above and not worse else Outcome.passed,
        "; ".join(lines),
    )


def _told(p: Part) -> str:
    assert p.base is not None and p.difference is not None
    return (
        f"{p.name}: {p.trained.mean:.4f}, the base {p.base.mean:.4f}, {p.difference.mean:+.4f}, surely {p.least:+.4f} "
        f"or more; {p.tokens:,} tokens of {p.trajectories} trajectories"
    )


def _without_a_score(scores: Scores) -> str:
    lost = scores.lost
    if not len(lost):
        return ""
    return f"{len(lost):,} of {len(scores.nll):,} supervised tokens have no finite score, the first: {scores.place(lost[0])}"
