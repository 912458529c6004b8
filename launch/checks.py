"""A check's result, as `make check` and `make sanity` show it: one row each, with a table of all rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.errors import sentence

WIDE = 140  # columns of a terminal that has room for what each check protects from
UNKNOWN = "not known until what failed passes"


class Outcome(StrEnum):
    """warned: unusual, and right in some runs; it does not fail the command. shown: a figure that no limit is known for."""

    passed = "pass"
    warned = "warn"
    failed = "fail"
    shown = "shown"


_MARKS = {
    Outcome.passed: ("pass", "green"),
    Outcome.warned: ("warn", "yellow"),
    Outcome.failed: ("FAIL", "bold red"),
    Outcome.shown: ("–", "dim"),
}


def judged(passed: bool) -> Outcome:
    """Return the outcome of a check that has a limit."""
    return Outcome.passed if passed else Outcome.failed


@dataclass(frozen=True)
class Check:
    """One row. protects_from: what goes wrong in the field if this fails. detail: what was seen, a few lines at most. fix: the
    override or command that makes it pass."""

    name: str
    protects_from: str
    figure: str
    limit: str
    outcome: Outcome
    detail: str = ""
    fix: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome is Outcome.failed

    @property
    def warned(self) -> bool:
        return self.outcome is Outcome.warned

    def as_json(self) -> dict[str, Any]:
        """Return its fields, `fix` only if there is one."""
        return {name: value for name, value in asdict(self).items() if name != "fix" or value}


def share(
    name: str, protects_from: str, good: int, of: int, least: float | None, faults: Sequence[str] = (), within: str = ""
) -> Check:
    """Return a check of how many of all are good.

    least: the share that must be good, 1 for all; None only shows the figure. faults: what is wrong with the others; the first
    three are shown. within: what else each is held to.
    """
    passed = of == 0 or least is None or good >= least * of
    figure = f"{good} of {of} ({good / of:.0%})" if of else "none to judge"
    limit = "shown" if least is None else "all" if least == 1 else f"at least {least:.0%}"
    limit = f"{limit}, {within}" if within else limit
    return Check(name, protects_from, figure, limit, judged(passed), "; ".join(faults[:3]))


def table(title: str, checks: Sequence[Check], width: int) -> Table:
    """Return a table with a row a check; those that are not known yet share the last one. width: columns of the terminal."""
    wide = width >= WIDE
    rows = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    rows.add_column("", no_wrap=True)
    rows.add_column("check", no_wrap=True)
    rows.add_column("found (limit)", overflow="fold")
    if wide:
        rows.add_column("protects from", style="dim")
    for c in checks:
        if c.figure != UNKNOWN:
            found = Text(c.figure).append(f" ({c.limit})" if c.limit not in ("", c.figure) else "", "dim")
            rows.add_row(Text(*_MARKS[c.outcome]), Text(c.name, "bold"), found, *([c.protects_from] if wide else []))
    if unknown := [c.name for c in checks if c.figure == UNKNOWN]:
        rows.add_row(Text("–", "dim"), "", Text(f"{UNKNOWN}: {', '.join(unknown)}", "dim"))
    return rows


def warn(checks: Sequence[Check], console: Console) -> None:
    """Print every warning with its fix."""
    for c in checks:
        if c.warned:
            line = f"warning: {c.name}: {sentence(c.figure, c.fix)}"
            console.print(line, style="yellow", markup=False, highlight=False)
