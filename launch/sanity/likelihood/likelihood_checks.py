"""The checks of held-out loss: server against trainer, trained against base, and what comes late against what comes early."""

from collections.abc import Sequence

from launch.checks import Check, Outcome, judged
from launch.sanity.likelihood.retention import ENOUGH, Part, Retention
from launch.sanity.likelihood.scores import Scores
from recipes.config import Dtype, Recipe


def beside_trainer(scores: Scores, whole: Part | None, trainers: float | None, recipe: Recipe) -> Check:
    """whole: of these scores alone. trainers: the trainer's own held-out loss of these weights, None where it is not known."""
    s = recipe.sanity
    tolerance = s.nll_tolerance if scores.fp32 and recipe.engine.dtype is Dtype.fp32 else s.nll_tolerance_bf16
    nll = float(scores.nll.mean())  # over supervised tokens, as the trainer's
    lost = _without_a_score(scores)
    sure = f"{whole.trained}; {whole.tokens:,} tokens of {whole.trajectories} trajectories" if whole else ""
    by = "" if trainers is None else f", {trainers:.6f} by the trainer"
    return Check(
        "held-out loss",
        "weights that serve otherwise than they trained",
        f"{nll:.6f} by the server{by}",
        "shown; the trainer's figure is not known" if trainers is None else f"within {tolerance:g}",
        judged(not lost and (trainers is None or abs(nll - trainers) <= tolerance)),
        lost or sure,
    )


def beside_base(found: Retention, base: Scores, recipe: Recipe) -> list[Check]:
    """found: the trained weights' scores compared with these of the base."""
    limit = recipe.sanity.max_above_base
    parts = {"loss by turn": found.turns, "loss by position": found.positions}
    return [
        _whole(found.whole, base, limit),
        *(_late(name, of_curve, found.whole, limit) for name, of_curve in parts.items()),
    ]


def _whole(whole: Part | None, base: Scores, limit: float) -> Check:
    """Worse than the base is odd and no failure: another way of talking than the held-out trajectories' is no fault."""
    name, protects = "held-out loss beside the base", "training that lost more than it taught"
    said = f"not surely more than {limit:g} above the base's"
    lost = _without_a_score(base)
    if whole is None or whole.base is None or whole.difference is None:
        return Check(name, protects, "no token has a score by both", said, Outcome.failed, lost)
    worse = whole.difference.low is not None and whole.difference.low > limit
    outcome = Outcome.failed if lost else Outcome.warned if worse else Outcome.passed
    figure = f"{whole.trained.mean:.4f}, the base {whole.base.mean:.4f}: {whole.difference.mean:+.4f}"
    return Check(
        name, protects, figure, said, outcome, f"by the base, {lost}" if lost else f"difference: {whole.difference}"
    )


def _late(name: str, parts: Sequence[Part], whole: Part | None, limit: float) -> Check:
    """Warns of parts that are surely worse than the base's while the whole is not.

    Each check warns of a checkpoint that is nowhere worse in at most 1 in 40, however many parts it has: the level is
    shared by all parts judged, and of fewer than `ENOUGH` trajectories none is."""
    seen = [p for p in parts if p.least is not None]
    above = [p for p in seen if p.least is not None and p.least > limit]
    worse = whole is not None and whole.difference is not None and (whole.difference.low or 0.0) > limit
    figure = f"{len(above)} of {len(seen)} parts" if seen else f"no part has {ENOUGH} trajectories"
    lines = [_told(p) for p in above]
    if above and worse:
        lines.append("the whole is worse too")
    return Check(
        name,
        "a model that has lost what comes late in a long trajectory",
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
