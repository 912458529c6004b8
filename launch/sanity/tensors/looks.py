"""Helpers for checks of files. A check whose files cannot be read fails, and the other checks continue."""

from collections.abc import Callable, Sequence

from launch.checks import Check, judged
from recipes.errors import LimiError

Look = Callable[[], tuple[str, Sequence[str]]]  # returns the figure and all faults
UNREADABLE = (LimiError, OSError, ValueError, LookupError, TypeError, AttributeError)  # errors that broken files cause


def file_check(name: str, protects_from: str, limit: str, look: Look) -> Check:
    """Return the check of what `look` returns. It fails if there are faults, or if `look` raises an error of broken files."""
    try:
        figure, faults = look()
    except UNREADABLE as error:
        figure, faults = "cannot be read", [f"{type(error).__name__}: {error}"]
    return Check(name, protects_from, figure, limit, judged(not faults), some(faults))


def some(faults: Sequence[str]) -> str:
    """Return the first four faults and the number of the others."""
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")


def differing(one: dict[str, object], base: dict[str, object], of: str) -> list[str]:
    """Return a line for every field of an export's file that differs from its expected value. of: the file's name."""
    absent = object()

    def shown(value: object) -> str:
        return "missing" if value is absent else repr(value)[:120]

    pairs = {k: (one.get(k, absent), base.get(k, absent)) for k in sorted(one.keys() | base.keys())}
    return [f"{of}: {k} is {shown(a)}, but should be {shown(b)}" for k, (a, b) in pairs.items() if a != b]
