"""Detection of tensors that hold another tensor's weights, or their own in another order, by comparison with the base alone.

Training adds changes that are independent of the base's tensors. By chance a tensor of n elements has a cosine of about 1/sqrt(n)
with any other tensor of the base, and a larger one with its own. The evidence for its own name against another is the log odds
n / 2 * log((1 - other**2) / (1 - own**2)), where own and other are the two cosines; it depends on no scale and no learning rate.
Far from the base both cosines are near zero and the position cannot be told: then the check warns and does not pass.
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

SURE = 18.0  # log odds that count as certain, six standard deviations: reached by chance by one pair in a billion
AT_ONCE = 256  # tensors compared with all others at a time


@dataclass
class Placement:
    """What is known of a tensor's position.

    fault: what is wrong, empty if nothing is known to be. own, other: its cosines with its own base tensor and with the most
    similar other one. margin: log odds that it is at its own position. order: log odds that its parts are in their order.
    """

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


def find(compared: Sequence[Seen]) -> list[Placement]:
    """Return the placement of every tensor whose name is in the base. Tensors equal to the base's are not examined."""
    found = {s.name: Placement(s.name) for s in compared if s.base is not None}
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


def _places(
    names: Sequence[str], every: dict[str, Prints], moved: dict[str, Prints], found: dict[str, Placement]
) -> None:
    """Compare tensors of one shape with every base tensor of that shape, and with their own in another reading order.

    Write cosines, margins and faults to `found`.
    """
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


def _orders(names: Sequence[str], moved: dict[str, Prints], found: dict[str, Placement]) -> None:
    """Compare each part of a family's tensors with all base parts of the family. Write order and faults to `found`."""
    parts = [(name, number) for name in names for number in range(moved[name].bands.count)]
    sizes = {name: moved[name].new_bands.shape[1] for name in names}
    if len(set(sizes.values())) > 1:  # no model has a family whose parts have different shapes
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
    # By choosing the best of all parts for each part, chance alone gains len(parts) * log(len(parts)).
    if np.maximum(-ahead, 0.0).sum() >= SURE + len(parts) * math.log(len(parts)):
        at = int(ahead.argmin())
        (name, number), (other, from_) = parts[at], parts[int(best[at])]
        bands = moved[name].bands
        of = "" if other == name else f" of {other}"
        what = f"{'columns' if bands.axis else 'rows'} in another order: {bands.part} {number} is the base's {bands.part} {from_}{of}"
        for one in dict.fromkeys(parts[i][0] for i in np.flatnonzero(ahead < 0)):
            found[one].fault = f"{one} has its {what}" if one == name else f"{one} is in another order too"
        return
    two = np.sort(ahead)[:2].sum()  # any other order has at least two parts at wrong positions
    for name in names:
        found[name].order = float(two)


def _odds(cosines: np.ndarray | float, n: int) -> np.ndarray:
    """Return the log-likelihood ratio of related to unrelated for two tensors of n elements with this cosine similarity."""
    explained = np.clip(cosines, 0.0, 1 - 1e-6) ** 2
    return np.asarray(-n / 2 * np.log1p(-explained))


def _directions(prints: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit length."""
    return np.asarray(prints / np.maximum(np.linalg.norm(prints, axis=1, keepdims=True), 1e-30))


def how(name: str, other: str) -> str:
    """Return in a word how two tensors were exchanged, if their names differ in one part; otherwise an empty text."""
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


def placement(found: Sequence[Placement], exact: Collection[str]) -> Check:
    """Return the check of all placements. exact: tensors equal to the trainer's bit for bit, which settles what the base cannot."""
    name, protects = (
        "weights in their places",
        "tensors that are swapped, transposed, or have rows or heads in another order",
    )
    wrong = [f.fault for f in found if f.fault]
    undecided = [f for f in found if not f.fault and not f.ordered]
    left = [f for f in undecided if f.name not in exact]
    placed, ordered = sum(f.placed for f in found), sum(f.ordered for f in found)
    figure = f"{placed} of {len(found)} confirmed by the base, {ordered} of them with the order of their parts"
    if len(left) < len(undecided):
        figure += f"; {len(undecided) - len(left)} more by the trainer's checkpoint"
    if left and not wrong:
        figure += f"; {len(left)} cannot be told"
    outcome = Outcome.failed if wrong else Outcome.warned if left else Outcome.passed
    detail = looks.some(wrong) if wrong else _undecided(left) if left else _least(found)
    return Check(name, protects, figure, "each surely matches its own base tensor", outcome, detail)


def _undecided(left: Sequence[Placement]) -> str:
    """Return one example of each kind of placement that cannot be told, and the number of the others."""
    lines = [f"{_likeness(f)}: its position cannot be told" for f in left if not f.placed][:1]
    lines += [f"the order of the parts of {f.name} cannot be told" for f in left if f.placed][:1]
    return "; ".join([*lines, *([f"and {len(left) - len(lines)} more"] if len(left) > len(lines) else [])])


def _least(found: Sequence[Placement]) -> str:
    least = min((f for f in found if f.placed and math.isfinite(f.margin)), key=lambda f: f.margin, default=None)
    return f"the least certain by the base: {_likeness(least)}" if least else ""


def _likeness(f: Placement) -> str:
    return f"{f.name} has a cosine of {f.own:.3f} with its own base tensor, and of {f.other:.3f} with the most similar other one"
