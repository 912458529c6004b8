"""Checks of files: each looks for faults, and one that cannot even look has failed, while the others go on."""

from collections.abc import Callable, Sequence

from launch.checks import Check, judged
from recipes.errors import LimiError

Look = Callable[[], tuple[str, Sequence[str]]]  # the figure, and every fault
UNREADABLE = (LimiError, OSError, ValueError, LookupError, TypeError, AttributeError)  # what broken files raise


def check(name: str, protects_from: str, limit: str, look: Look) -> Check:
    try:
        figure, faults = look()
    except UNREADABLE as error:
        figure, faults = "cannot be read", [f"{type(error).__name__}: {error}"]
    return Check(name, protects_from, figure, limit, judged(not faults), some(faults))


def some(faults: Sequence[str]) -> str:
    """The first few, and how many more."""
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")


def differing(one: dict[str, object], base: dict[str, object], of: str) -> list[str]:
    """A line for every field that differs between an export's file and what it should be."""
    absent = object()

    def shown(value: object) -> str:
        return "missing" if value is absent else repr(value)[:120]

    pairs = {k: (one.get(k, absent), base.get(k, absent)) for k in sorted(one.keys() | base.keys())}
    return [f"{of}: {k} is {shown(a)}, and should be {shown(b)}" for k, (a, b) in pairs.items() if a != b]
