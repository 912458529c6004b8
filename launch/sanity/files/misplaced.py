"""Which tensors hold another's weights, or their own in another order, by the base alone.

What training adds to a tensor is independent of the base's tensors. A tensor of n elements has a cosine of about 1/sqrt(n) with any
other of the base's, by chance, and a greater one with its own. How much surer its own place is than another is the logarithm of the
odds of what is left over, n / 2 * log((1 - other**2) / (1 - own**2)): no scale and no rate is in it. Far from the base both come near
zero, and the place cannot be told: that is said, and never taken for good.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from launch.checks import Check, Outcome
from launch.sanity.tensors import looks
from launch.sanity.tensors.compare_worker import Seen
from launch.sanity.tensors.prints import Prints

SURE = 18.0  # of the odds' logarithm, six standard deviations: one pair in a billion comes so far by chance
AT_ONCE = 256  # tensors compared with all others at a time


@dataclass
class Found:
    """What is known of a tensor. fault: what it holds, empty where that is its own as far as is known. own, other: its cosines with
    its own base and with the likest other. margin, order: the odds' logarithms of its place, and of the order of its parts."""

    name: str
    own: float = 0.0
    other: float = 0.0
    margin: float = math.inf
    order: float = math.inf
    fault: str = ""

    @property
    def placed(self) -> bool:
        return not self.fault and self.margin >= SURE

    @property
    def ordered(self) -> bool:
        return self.placed and self.order >= SURE


def find(compared: Sequence[Seen]) -> list[Found]:
    """Of every tensor that has a base's of its name. Of those with the base's very bits nothing is asked."""
    found = {s.name: Found(s.name) for s in compared if s.base is not None}
    moved = {s.name: s.base.prints for s in compared if s.base and s.base.prints and not s.base.equal}
    every = {s.name: s.base.prints for s in compared if s.base and s.base.prints}
    shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for s in compared:
        if s.name in every:
            shapes[s.shape].append(s.name)
    for names in shapes.values():
        _places(names, every, moved, found)
    families: dict[str, list[str]] = defaultdict(list)
    for name, prints in moved.items():
        if prints.bands.count > 1:
            families[prints.bands.family].append(name)
    for names in families.values():
        if not any(found[n].fault for n in names):
            _orders(names, moved, found)
    return list(found.values())


def _places(names: Sequence[str], every: dict[str, Prints], moved: dict[str, Prints], found: dict[str, Found]) -> None:
    """Compares tensors of one shape with every base tensor of it, and with their own read otherwise."""
    base = _directions(np.stack([every[n].base for n in names]))
    asked = [n for n in names if n in moved]
    at = {name: number for number, name in enumerate(names)}
    for some in (asked[i : i + AT_ONCE] for i in range(0, len(asked), AT_ONCE)):
        new = _directions(np.stack([every[n].new for n in some]))
        alike = new @ base.T
        for row, name in enumerate(some):
            prints, own = every[name], at[name]
            otherwise = {
                f"its own {read}": float(new[row] @ _directions(other[None])[0]) for read, other in prints.other.items()
            }
            others = np.delete(alike[row], own)
            if len(others):
                best = int(others.argmax())
                other = names[best + (best >= own)]
                otherwise[f"the base's {other}{how(name, other)}"] = float(others[best])
            what, of = max(otherwise.items(), key=lambda one: one[1], default=("", 0.0))
            n, one = len(prints.new), found[name]
            one.own, one.other = float(alike[row, own]), of
            one.margin = _odds(one.own, n) - _odds(of, n)
            if one.margin <= -SURE:
                one.fault = f"{name} is {what}"


def _orders(names: Sequence[str], moved: dict[str, Prints], found: dict[str, Found]) -> None:
    """Compares the parts of the tensors of a family with one another's. Any other order has two in a wrong place at least."""
    parts = [(name, number) for name in names for number in range(moved[name].bands.count)]
    sizes = {name: moved[name].new_bands.shape[1] for name in names}
    if len(set(sizes.values())) > 1:  # tensors of a family with parts of unlike shapes are of no model
        return
    n = sizes[names[0]]
    new, base = (
        _directions(np.concatenate([getattr(moved[x], f) for x in names])) for f in ("new_bands", "base_bands")
    )
    odds = _odds(new @ base.T, n)
    own = odds.diagonal()
    others = odds - np.diag(np.full(len(parts), np.inf))
    best = others.argmax(1)
    ahead = own - others.max(1)
    # Free to choose among all parts for each, chance alone finds so much more.
    if np.maximum(-ahead, 0.0).sum() >= SURE + len(parts) * math.log(len(parts)):
        at = int(ahead.argmin())
        (name, number), (other, from_) = parts[at], parts[int(best[at])]
        bands = moved[name].bands
        of = "" if other == name else f" of {other}"
        what = f"{'columns' if bands.axis else 'rows'} in another order: {bands.part} {number} is the base's {bands.part} {from_}{of}"
        for one in dict.fromkeys(parts[i][0] for i in np.flatnonzero(ahead < 0)):
            found[one].fault = f"{one} has its {what}" if one == name else f"{one} is in another order too"
        return
    two = np.sort(ahead)[:2].sum()
    for name in names:
        found[name].order = float(two)


def _odds(cosines: np.ndarray | float, n: int) -> np.ndarray:
    """The logarithm of the odds that so many elements have this cosine with what they came from, beside none."""
    explained = np.clip(cosines, 0.0, 1 - 1e-6) ** 2
    return np.asarray(-n / 2 * np.log1p(-explained))


def _directions(prints: np.ndarray) -> np.ndarray:
    return np.asarray(prints / np.maximum(np.linalg.norm(prints, axis=1, keepdims=True), 1e-30))


def how(name: str, other: str) -> str:
    """In a word, where two names differ in one place."""
    words = [(a, b) for a, b in itertools.zip_longest(name.split("."), other.split(".")) if a != b]
    if len(words) != 1:
        return ""
    if {*words[0]} == {"gate_proj", "up_proj"}:
        return " (gate and up swapped)"
    if not (words[0][0] or "").isdigit():
        return " (swapped)"
    return (
        " (experts shuffled)"
        if ".experts." in name and name.split(".")[2] == other.split(".")[2]
        else " (layers shuffled)"
    )


def check(found: Sequence[Found], exact: Collection[str]) -> Check:
    """exact: tensors that are the trainer's own, bit for bit, which tells of these what the base cannot."""
    name, protects = "weights in their places", "tensors swapped or transposed, their rows or heads in another order"
    wrong = [f.fault for f in found if f.fault]
    untold = [f for f in found if not f.fault and not f.ordered]
    left = [f for f in untold if f.name not in exact]
    placed, ordered = sum(f.placed for f in found), sum(f.ordered for f in found)
    figure = f"{placed} of {len(found)} told by the base, {ordered} of them with the order of their parts"
    if len(left) < len(untold):
        figure += f"; {len(untold) - len(left)} more by the trainer's checkpoint"
    if left and not wrong:
        figure += f"; {len(left)} cannot be told"
    outcome = Outcome.failed if wrong else Outcome.warned if left else Outcome.passed
    detail = looks.some(wrong) if wrong else _untold(left) if left else _least(found)
    return Check(name, protects, figure, "each its own of the base's, surely", outcome, detail)


def _untold(left: Sequence[Found]) -> str:
    """An example of each kind."""
    lines = [f"{_likeness(f)}: its place cannot be told" for f in left if not f.placed][:1]
    lines += [f"the order of the parts of {f.name} cannot be told" for f in left if f.placed][:1]
    return "; ".join([*lines, *([f"and {len(left) - len(lines)} more"] if len(left) > len(lines) else [])])


def _least(found: Sequence[Found]) -> str:
    least = min((f for f in found if f.placed and math.isfinite(f.margin)), key=lambda f: f.margin, default=None)
    return f"the least sure by the base: {_likeness(least)}" if least else ""


def _likeness(f: Found) -> str:
    return f"{f.name} has a cosine of {f.own:.3f} with its own base, of {f.other:.3f} with the likest other"
