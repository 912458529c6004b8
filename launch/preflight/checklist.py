"""Checks before a run: each is a function that looks and returns what it found. None keeps the others from running."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.checks import UNKNOWN, Check, Outcome
from recipes.compose.os_errors import named
from recipes.config import Recipe
from recipes.errors import LimiError, PreflightError


@dataclass(frozen=True)
class Found:
    """What a check saw. fix: the override or command that makes it pass, empty if nothing is wrong. judged: False if the figure is
    only shown. odd: whether this is right in some runs, so that it only warns."""

    text: str
    limit: str = ""
    fix: str = ""
    judged: bool = True
    odd: bool = False

    @property
    def outcome(self) -> Outcome:
        if self.odd:
            return Outcome.warned
        if self.fix:
            return Outcome.failed
        return Outcome.passed if self.judged else Outcome.shown


def check(name: str, protects_from: str) -> Callable[[Callable[..., Found]], Callable[..., Check]]:
    """Turn a function that looks into one that returns a `Check`.

    An error that it raises fails the check. An argument that is None was not found out, because an earlier check failed: then this
    one says so and is not judged.
    """

    def decorate(look: Callable[..., Found]) -> Callable[..., Check]:
        @functools.wraps(look)
        def checked(*arguments: object) -> Check:
            found = Found(UNKNOWN, judged=False) if any(a is None for a in arguments) else _looked(look, arguments)
            return Check(name, protects_from, found.text, found.limit, found.outcome, fix=found.fix)

        return checked

    return decorate


def _looked(look: Callable[..., Found], arguments: Sequence[object]) -> Found:
    try:
        return look(*arguments)
    except LimiError as error:
        return Found(error.problem, fix=error.fix or error.problem)
    except OSError as error:
        fault = named(error, next((a for a in arguments if isinstance(a, Recipe)), None))
        return Found(fault.problem, fix=fault.fix or fault.problem)
    except Exception as error:  # any fault of the machine: the other checks go on
        return Found(
            f"{type(error).__name__}: {error}", fix="fix what this error names: the check itself could not run"
        )


def refuse(checks: Sequence[Check]) -> None:
    """Raise `PreflightError` with every failed check, what it protects from, and its fix."""
    failed = [c for c in checks if c.failed]
    if failed:
        text = [
            f"  {c.name}: {c.figure}{f' (limit: {c.limit})' if c.limit else ''}\n    protects from {c.protects_from}\n    → {c.fix}"
            for c in failed
        ]
        raise PreflightError("\n".join([f"{len(failed)} of {len(checks)} checks failed:", *text]))
