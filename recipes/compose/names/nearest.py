"""What was meant by a word that is not known: the one known word it is a slip of, or none.

A slip is a letter too many, a letter too few, another letter, or two neighbours that changed places. Another digit counts as two
slips: `glm4.6` and `h200` are other things than `glm4.5` and `h100`, and seldom the same thing misspelt. A word of five letters
may have two slips, one of three letters may have one, and a shorter word none, as every short word is near to some other.
`learning_rate` and `nll_tolerance`, `max_steps` and `save_steps` are further apart. Where two known words are equally near,
neither is named: advice that is followed must not train something else.
"""

from collections.abc import Iterable

_MOST = 2


def folded(word: str) -> str:
    """The word without what tells apart no two names: case, `-` or `_`, space around it."""
    return word.strip().casefold().replace("-", "_")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` was meant to be, or None."""
    found: dict[int, list[str]] = {}
    for other in known:
        if (count := _slips(word, other)) is not None:
            found.setdefault(count, []).append(other)
    best = found[min(found)] if found else []
    return best[0] if len(best) == 1 else None


def same_key(name: str, options: Iterable[str]) -> list[str]:
    """The options whose last part is that of `name`."""
    key = folded(name).rpartition(".")[2]
    return [option for option in options if folded(option).rpartition(".")[2] == key]


def misspelt(name: str, options: Iterable[str]) -> list[str]:
    """The option that `name` is a slip of. Several where their last part is the same and `name` does not say which."""
    group, dot, key = folded(name).rpartition(".")
    found: dict[int, list[str]] = {}
    for option in options:
        other_group, _, other_key = folded(option).rpartition(".")
        # In a group that is spelt right, a key of two letters may have a slip too: `layout.` has few others.
        in_key = _slips(key, other_key, least=1 if dot and group == other_group else 0)
        in_group = _slips(group, other_group) if dot else 0
        if in_key is not None and in_group is not None and in_key + in_group <= _MOST:
            found.setdefault(in_key + in_group, []).append(option)
    best = found[min(found)] if found else []
    return best if len({option.rpartition(".")[2] for option in best}) == 1 else []


def _slips(word: str, known: str, least: int = 0) -> int | None:
    """Slips between the two, None where they are more than words of their length may have, `least` at least."""
    word, known = folded(word), folded(known)
    letters = max(sum(c.isalpha() for c in w) for w in (word, known))
    allowed = max(least, 0 if letters < 3 else 1 if letters < 5 else _MOST)
    if abs(len(word) - len(known)) > allowed:
        return None
    count = _distance(word, known, allowed)
    return count if count <= allowed else None


def _distance(a: str, b: str, most: int) -> int:
    """Slips that turn `a` into `b`: the optimal string alignment distance. More than `most` are not counted to the end."""
    above: list[int] = []
    row = [0]
    for c in b:
        row.append(row[-1] + _weight(c))
    for i, c in enumerate(a):
        before, above, row = above, row, [row[0] + _weight(c)]
        for j, d in enumerate(b):
            other = 0 if c == d else max(_weight(c), _weight(d))
            row.append(min(above[j] + other, above[j + 1] + _weight(c), row[j] + _weight(d)))
            if i and j and c == b[j - 1] and d == a[i - 1] and c != d:
                row[-1] = min(row[-1], before[j - 1] + max(_weight(c), _weight(d)))
        if min(*row, *above) > most:
            return most + 1
    return row[-1]


def _weight(c: str) -> int:
    return 2 if c.isdigit() else 1
