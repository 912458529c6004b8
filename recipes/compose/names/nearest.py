"""The known word that an unknown word misspells, or none.

A slip is an extra letter, a missing letter, a different letter, or two swapped neighbours. A different digit counts as two slips:
`glm4.6` and `h200` are usually not misspellings of `glm4.5` and `h100`. A word of five letters may have two slips and a word of
three letters one. A shorter word may have none, because every short word is close to some other word. `learning_rate` and
`nll_tolerance`, or `max_steps` and `save_steps`, are further apart. If two known words are equally near, neither is named,
because a user who follows the advice must not train something else.
"""

from collections.abc import Iterable

_MOST = 2


def folded(word: str) -> str:
    """Return the word without differences in case, in `-` and `_`, and in surrounding space."""
    return word.strip().casefold().replace("-", "_")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the single word of `known` that is nearest to `word`, or None."""
    found: dict[int, list[str]] = {}
    for other in known:
        if (count := _slips(word, other)) is not None:
            found.setdefault(count, []).append(other)
    best = found[min(found)] if found else []
    return best[0] if len(best) == 1 else None


def same_key(name: str, options: Iterable[str]) -> list[str]:
    """Return the options with the same last part as `name`."""
    key = folded(name).rpartition(".")[2]
    return [option for option in options if folded(option).rpartition(".")[2] == key]


def misspelt(name: str, options: Iterable[str]) -> list[str]:
    """Return the option that `name` misspells. Return several if they share a last part and `name` has no group."""
    group, dot, key = folded(name).rpartition(".")
    found: dict[int, list[str]] = {}
    for option in options:
        other_group, _, other_key = folded(option).rpartition(".")
        # With a correct group, even a key of two letters may have a slip, because `layout.` has few others.
        in_key = _slips(key, other_key, least=1 if dot and group == other_group else 0)
        in_group = _slips(group, other_group) if dot else 0
        if in_key is not None and in_group is not None and in_key + in_group <= _MOST:
            found.setdefault(in_key + in_group, []).append(option)
    best = found[min(found)] if found else []
    return best if len({option.rpartition(".")[2] for option in best}) == 1 else []


def _slips(word: str, known: str, least: int = 0) -> int | None:
    """Return the number of slips between two words, or None if it is more than their length allows.

    least: slips that are allowed at any length.
    """
    word, known = folded(word), folded(known)
    letters = max(sum(c.isalpha() for c in w) for w in (word, known))
    allowed = max(least, 0 if letters < 3 else 1 if letters < 5 else _MOST)
    if abs(len(word) - len(known)) > allowed:
        return None
    count = _distance(word, known, allowed)
    return count if count <= allowed else None


def _distance(a: str, b: str, most: int) -> int:
    """Return the optimal string alignment distance of two words: the slips that turn `a` into `b`.

    Counting stops above `most`.
    """
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
    """Return the slips that a wrong character counts as."""
    return 2 if c.isdigit() else 1
