"""The report's plot of held-out loss by position and by turn, for the trained model and the base."""

import math
from collections.abc import Sequence, Sized
from itertools import pairwise
from typing import Any

from launch.sanity.likelihood.retention import ENOUGH
from recipes import html_page


def plot(likelihood: dict[str, Any]) -> str:
    """Return the plot. likelihood: content of `likelihood.json`.

    A bar spans a part and its band shows the interval. Parts with few trajectories are pale.
    """
    from matplotlib.figure import Figure

    if likelihood["whole"] is None:
        return ""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    positions, turns = likelihood["positions"], likelihood["turns"]
    # The first part starts at 0, which a logarithmic axis cannot show: it is drawn from half of its end.
    edges = [(math.log2(p["first"] or p["end"] / 2), math.log2(p["end"] or 2 * p["first"])) for p in positions]
    _draw(left, positions, edges)
    ticks = {math.log2(t): f"{t // 1024}k" for p in positions for t in (p["first"], p["end"]) if t}
    if positions[0]["first"] == 0:
        ticks[edges[0][0]] = "0"
    for tick, following in pairwise(sorted(ticks)):
        if following - tick < 0.5:
            del ticks[tick]  # the two labels would overlap
    left.set_xticks(list(ticks), list(ticks.values()), **_tilt(ticks))
    left.set(xlabel="position in the sequence, tokens", ylabel="loss, nats per supervised token")
    _draw(right, turns, [(n - 0.4, n + 0.4) for n in range(len(turns))])
    right.set_xticks(range(len(turns)), [p["name"] for p in turns], **_tilt(turns))
    right.set_xlabel("supervised turn of the trajectory")
    left.set_ylim(*_heights([*positions, *turns]))
    few = any(p["trajectories"] < ENOUGH for p in [*positions, *turns])
    left.legend(title=f"pale: fewer than {ENOUGH} trajectories" if few else None)
    return html_page.image(figure, "held-out loss by position and by turn, with intervals")


_COLORS = {"base": "tab:gray", "trained": "tab:blue"}


def _draw(axes: Any, parts: Sequence[dict[str, Any]], edges: Sequence[tuple[float, float]]) -> None:
    for who, color in _COLORS.items():
        if any(p[who] is None for p in parts):
            continue
        axes.plot(
            [(a + b) / 2 for a, b in edges], [p[who]["mean"] for p in parts], color=color, linewidth=0.8, alpha=0.5
        )
        for n, (p, (a, b)) in enumerate(zip(parts, edges, strict=True)):
            mean, few = p[who], p["trajectories"] < ENOUGH
            label = None if n else f"{who}, {'95% intervals' if mean['low'] is not None else 'one trajectory'}"
            axes.plot([a, b], [mean["mean"]] * 2, color=color, linewidth=2, alpha=0.4 if few else 1, label=label)
            if mean["low"] is not None:
                axes.fill_between(
                    [a, b], mean["low"], mean["high"], color=color, alpha=0.08 if few else 0.25, linewidth=0
                )


def _tilt(labels: Sized) -> dict[str, Any]:
    return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 7 else {}


def _heights(parts: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the y range: all means, and the intervals of parts with enough trajectories.

    Wider intervals of few trajectories would flatten the curve to a line.
    """
    seen = [p[who] for p in parts for who in _COLORS if p[who] is not None]
    sure = [p[who] for p in parts for who in _COLORS if p[who] is not None and p["trajectories"] >= ENOUGH]
    values = [m["mean"] for m in seen] + [m[end] for m in sure for end in ("low", "high")]
    room = 0.15 * (max(values) - min(values)) or 0.1
    return min(values) - room, max(values) + room
