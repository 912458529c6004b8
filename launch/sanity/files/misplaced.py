"""Which tensors hold another's weights: by fingerprints, the same few elements of every matrix of a shape."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from launch.sanity.files.compare_worker import Prints, Seen

AT_ONCE = 256  # tensors compared with all others at a time
LIKE = 0.5  # cosine of fingerprints: unlike tensors of 256 elements are within 0.25 of zero
CLEARLY = 0.25  # by so much more like another than like its own


def causes(compared: Sequence[Seen]) -> dict[str, str]:
    """{tensor: what it holds} of those that are another's, or their own transposed."""
    shapes: dict[tuple[int, ...], dict[str, Prints]] = defaultdict(dict)
    for s in compared:
        if s.base is not None and s.base.prints is not None:
            shapes[s.shape][s.name] = s.base.prints
    found: dict[str, str] = {}
    for held in shapes.values():
        found |= _of_shape(held)
    return found


def _of_shape(held: dict[str, Prints]) -> dict[str, str]:
    names = list(held)
    new, base = (_directions([getattr(p, field) for p in held.values()]) for field in ("new", "base"))
    turned = [p.turned for p in held.values() if p.turned is not None]  # of all, or of none
    own = (new * base).sum(1)
    over = (new * _directions(turned)).sum(1) if turned else np.full_like(own, -1.0)
    found = {}
    suspects = np.flatnonzero(own < LIKE)
    for rows in np.split(suspects, range(AT_ONCE, len(suspects), AT_ONCE)):
        alike = new[rows] @ base.T
        for row, best in zip(rows, alike.argmax(1) if len(rows) else [], strict=True):
            like = max(float(new[row] @ base[best]), float(over[row]))
            if like < LIKE or like < own[row] + CLEARLY:
                continue
            transposed = over[row] >= like
            found[names[row]] = f"{names[row]} is " + (
                "the base's transposed" if transposed else f"the base's {names[best]}{_how(names[row], names[best])}"
            )
    return found


def _directions(prints: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(prints)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-30)


def _how(name: str, other: str) -> str:
    """In a word, where two names differ in one place."""
    words = [(a, b) for a, b in zip(name.split("."), other.split("."), strict=False) if a != b]
    if len(words) != 1 or len(name.split(".")) != len(other.split(".")):
        return ""
    if {*words[0]} == {"gate_proj", "up_proj"}:
        return " (gate and up swapped)"
    if not words[0][0].isdigit():
        return " (swapped)"
    return (
        " (experts shuffled)"
        if ".experts." in name and name.split(".")[2] == other.split(".")[2]
        else " (layers shuffled)"
    )
