"""A check: a name, what it protects from, a figure, a limit, and an outcome."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """warned: odd, and right in some runs; it is shown and ends nothing."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


def judged(passed: bool) -> Outcome:
    return Outcome.passed if passed else Outcome.failed


@dataclass(frozen=True)
class Check:
    """protects_from: what goes wrong in the field where this fails. detail: what was seen, a few lines at most."""

    name: str
    protects_from: str
    figure: str
    limit: str
    outcome: Outcome
    detail: str = ""


def share(
    name: str, protects_from: str, good: int, of: int, least: float | None, faults: Sequence[str] = (), within: str = ""
) -> Check:
    """How many of all are good. least: the share that must be, 1 for all; only shown where it is None, or there is none to
    judge. faults: of the others, the first few are shown. within: what else each is held to."""
    right = of == 0 or least is None or good >= least * of
    figure = f"{good} of {of} ({good / of:.0%})" if of else "none to judge"
    limit = "shown" if least is None else "all" if least == 1 else f"at least {least:.0%}"
    limit = f"{limit}, {within}" if within else limit
    return Check(name, protects_from, figure, limit, judged(right), "; ".join(faults[:3]))
