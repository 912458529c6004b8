"""Checks of how far training moved the weights from the base: by kind of tensor and layer, and compared with the learning rates.

Adam moves an element by about its learning rate per step, so by at most a multiple of the sum of the rates. In bf16 an element
changes only if that exceeds half a unit in its last place: at 1e-5 for a few steps a norm of 1.0 correctly stays unchanged.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.checks import Check, Outcome, judged
from launch.sanity.tensors import looks
from launch.sanity.tensors.compare_worker import Reach, Seen
from launch.sanity.tensors.tensor_place import MTP, NORM, ROUTER_BIAS, place
from recipes.config import Model

ENOUGH = 30  # if this many elements should have moved and none did, that is no coincidence
_UNTRAINED = (ROUTER_BIAS, MTP)


@dataclass
class Cell:
    """Sums over all tensors of one kind in one layer (None: outside the layers).

    changed: elements that differ from the base as bf16. movable: elements that the rates can change as bf16. largest: the
    largest change of an element.
    """

    kind: str
    layer: int | None
    elements: int = 0
    changed: int = 0
    movable: int = 0
    largest: float = 0.0

    @property
    def share(self) -> float:
        return self.changed / self.elements if self.elements else 0.0

    def add(self, seen: Seen) -> None:
        assert seen.base is not None
        self.elements += seen.elements
        self.changed += seen.base.changed
        self.movable += seen.base.movable
        self.largest = max(self.largest, seen.base.largest)


def cells(seen: Iterable[Seen], m: Model) -> list[Cell]:
    """Return the cells of all tensors that have a base tensor."""
    found: dict[tuple[str, int | None], Cell] = {}
    for one in seen:
        if one.base is not None:
            at = place(one.name, m)
            found.setdefault((at.kind, at.layer), Cell(at.kind, at.layer)).add(one)
    return list(found.values())


def as_json(found: Sequence[Cell], training: Reach, times: float) -> dict[str, Any]:
    """Return the content of `moved.json`: shares of elements that changed as bf16. Rates and limit are null if unknown."""
    known = math.isfinite(training.rates)
    return {
        "sum_of_rates": training.rates if known else None,
        "limit": training.rates * times if known else None,
        "cells": [{**asdict(c), "share": c.share} for c in found],
    }


def trained(seen: dict[str, Seen], m: Model) -> list[Seen]:
    """Return the tensors that training updates and that have a base tensor."""
    return [s for s in seen.values() if s.base is not None and place(s.name, m).kind not in _UNTRAINED]


def moved_checks(seen: dict[str, Seen], training: Reach, times: float, m: Model) -> list[Check]:
    """Return the checks. times: the largest allowed change, as a multiple of the sum of the rates (`sanity.max_moved`)."""
    compared = trained(seen, m)
    return [
        _far(compared, training, times),
        _everywhere(compared, training, m),
        *([_experts(compared, m), _frozen(seen, m)] if m.experts else []),
    ]


def _far(compared: Sequence[Seen], training: Reach, times: float) -> Check:
    limit = training.rates * times
    known = math.isfinite(limit)

    def look() -> tuple[str, Sequence[str]]:
        # An all-zero tensor has a check of its own.
        far = {s.name: s.base for s in compared if s.base is not None and s.base.beyond > limit and not s.zero}
        largest = max((s.base.largest for s in compared if s.base), default=0.0)
        figure = f"{largest:.2g} at most" + (f"; the rates sum to {training.rates:.2g}" if known else "")
        return figure, [f"{n} moved by {b.largest:.2g}" for n, b in far.items()]

    shown = f"{limit:.2g}, {times:g} times the rates" if known else "shown; the rates are not known"
    return looks.file_check("how far weights moved", "weights that training cannot have produced", shown, look)


def _everywhere(compared: Sequence[Seen], training: Reach, m: Model) -> Check:
    found = cells(compared, m)
    elements, changed = sum(c.elements for c in found), sum(c.changed for c in found)
    name, protects, limit = (
        "every layer moved",
        "layers that were not trained or not exported",
        "every layer, every kind",
    )
    if not elements:
        return Check(name, protects, "no tensor could be compared with the base's", limit, Outcome.failed)
    if not changed:
        movable = sum(c.movable for c in found) / elements
        if movable < 0.1:
            said = f"the rates sum to {training.rates:.2g}, which can change {movable:.1%} of the elements as bf16"
            return Check(name, protects, "nothing moved", limit, Outcome.warned, said)
        said = "these are the base's weights; export the trained checkpoint"
        return Check(name, protects, "nothing moved", limit, Outcome.failed, said)
    still = _still(found)
    return Check(
        name,
        protects,
        f"{changed / elements:.1%} of {elements:,} elements changed in training, compared in bf16",
        limit,
        judged(not still),
        looks.some(still),
    )


def _still(found: Sequence[Cell]) -> list[str]:
    """Return a line for each layer and kind in which nothing moved, although at least `ENOUGH` elements should have.

    The expected number follows from the share that moved in other layers of the same kind.
    """
    kinds: dict[str, list[Cell]] = defaultdict(list)
    layers: dict[int | None, list[Cell]] = defaultdict(list)
    for c in found:
        kinds[c.kind].append(c)
        layers[c.layer].append(c)
    average = sum(c.changed for c in found) / sum(c.elements for c in found)
    odd = set()
    for c in found:
        others = [o for o in kinds[c.kind] if o is not c]
        moved, of = sum(o.changed for o in others), sum(o.elements for o in others)
        # A kind with a single cell, e.g. the embedding, may move less than others: few of its rows are ever used.
        share = moved / of if of else average / 100
        if c.kind != NORM and not c.changed and share * c.elements >= ENOUGH:
            odd.add((c.kind, c.layer))
    lines = []
    for layer, held in layers.items():
        names = [c.kind for c in held if (c.kind, layer) in odd]
        if names and not any(c.changed for c in held) and layer is not None:
            lines.append(f"nothing moved in layer {layer}, but its neighbours moved")
        elif names:
            lines.append(f"nothing moved in {', '.join(names)}{'' if layer is None else f' of layer {layer}'}")
    return lines


def _experts(compared: Sequence[Seen], m: Model) -> Check:
    """Check that each expert number moved in some layer. If not, the weights of an expert-parallel rank may have been lost.

    It only warns, because an expert may rarely be routed to.
    """
    experts: dict[int, Cell] = {}
    for s in compared:
        if (number := place(s.name, m).expert) is not None:
            experts.setdefault(number, Cell("experts", None)).add(s)
    total, changed = sum(c.elements for c in experts.values()), sum(c.changed for c in experts.values())
    still = [e for e, c in sorted(experts.items()) if not c.changed and changed / total * c.elements >= ENOUGH]
    said = (
        f"expert {', '.join(map(str, still[:8]))} moved in no layer: never routed to, or not exported" if still else ""
    )
    return Check(
        "every expert moved", "experts of a rank whose weights were lost", f"{len(experts) - len(still)} of {len(experts)}",
        "every expert, in some layer", Outcome.warned if still else Outcome.passed, said,
    )  # fmt: skip


def _frozen(seen: dict[str, Seen], m: Model) -> Check:
    def look() -> tuple[str, Sequence[str]]:
        biases = [s for s in seen.values() if s.base is not None and place(s.name, m).kind == ROUTER_BIAS]
        lines = [
            f"{s.name} is the base's rounded to bf16"
            if s.base.rounded
            else f"{s.name} differs from the base's by {s.base.largest:.1e}"
            for s in biases
            if s.base is not None and not s.base.equal
        ]
        return f"{len(biases) - len(lines)} of {len(biases)}", lines

    return looks.file_check("router bias", "experts chosen differently from the base", "the base's bits, frozen", look)
