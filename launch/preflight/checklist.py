"""Checks that end in a row each: what was found, within which limit, and what fixes it. None keeps the others from being made."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.compose.os_errors import named
from recipes.config import Recipe
from recipes.errors import LimiError, PreflightError, sentence

NOT_KNOWN = "not known without what is red"
WIDE = 140  # columns, from which on every row has room for what it protects from


@dataclass(frozen=True)
class Found:
    """What a check saw. fix: the override or command that fixes it, empty where nothing is wrong. judged: whether it is
    checked at all, or only shown. odd: whether it is right in some runs, so that it is said with its fix and ends nothing."""

    text: str
    limit: str = ""
    fix: str = ""
    judged: bool = True
    odd: bool = False


@dataclass(frozen=True)
class Row:
    """A check with its outcome; protects: from what it protects a run."""

    name: str
    protects: str
    found: str
    limit: str
    fix: str
    judged: bool
    odd: bool

    @property
    def red(self) -> bool:
        return bool(self.fix) and not self.odd

    @property
    def mark(self) -> Text:
        if self.red:
            return Text("FAIL", "bold red")
        if self.odd:
            return Text("warn", "yellow")
        return Text("pass", "green") if self.judged else Text("–", "dim")


def check(name: str, protects: str) -> Callable[[Callable[..., Found]], Callable[..., Row]]:
    """Makes a row of a function that looks: an error that it raises is a red one. Where an argument is None, which a check before
    it could not find out, the row says so and is not judged: that check is red."""

    def made(look: Callable[..., Found]) -> Callable[..., Row]:
        @functools.wraps(look)
        def row(*arguments: object) -> Row:
            found = Found(NOT_KNOWN, judged=False) if any(a is None for a in arguments) else _looked(look, arguments)
            return Row(name, protects, found.text, found.limit, found.fix, found.judged, found.odd)

        return row

    return made


def _looked(look: Callable[..., Found], arguments: Sequence[object]) -> Found:
    try:
        return look(*arguments)
    except LimiError as error:
        return Found(error.problem, fix=error.fix or error.problem)
    except OSError as error:
        fault = named(error, next((a for a in arguments if isinstance(a, Recipe)), None))
        return Found(fault.problem, fix=fault.fix or fault.problem)
    except Exception as error:  # whatever a machine may have in store: the other checks go on
        return Found(
            f"{type(error).__name__}: {error}", fix="the check itself could not be made: fix what its error names"
        )


def table(rows: Sequence[Row], width: int) -> Table:
    """A line a check; what is not known yet is listed in the last. width: columns of the terminal, `WIDE` ones show from what
    each protects; `refuse` says it of the red ones, with what fixes them, and `warn` what fixes the odd ones."""
    wide = width >= WIDE
    out = Table(title="Before a GPU is held", title_justify="left", title_style="bold", box=None, pad_edge=False)
    out.add_column("", no_wrap=True)
    out.add_column("check", no_wrap=True)
    out.add_column("found (limit)", overflow="fold")
    if wide:
        out.add_column("protects from", style="dim")
    for r in rows:
        if r.found == NOT_KNOWN:
            continue
        found = Text(r.found).append(f" ({r.limit})" if r.limit and r.limit != r.found else "", "dim")
        out.add_row(r.mark, Text(r.name, "bold"), found, *([r.protects] if wide else []))
    if unknown := [r.name for r in rows if r.found == NOT_KNOWN]:
        out.add_row(Text("–", "dim"), "", Text(f"{NOT_KNOWN}: {', '.join(unknown)}", "dim"))
    return out


def refuse(rows: Sequence[Row]) -> None:
    """Raises `PreflightError` with every red row, from what it protects and what fixes it."""
    red = [r for r in rows if r.red]
    if red:
        text = [
            f"  {r.name}: {r.found}{f' (limit: {r.limit})' if r.limit else ''}\n    protects from {r.protects}\n    → {r.fix}"
            for r in red
        ]
        raise PreflightError("\n".join([f"{len(red)} of {len(rows)} checks failed:", *text]))


def warn(rows: Sequence[Row], console: Console) -> None:
    """Says every odd row, with what fixes it."""
    for row in rows:
        if row.odd:
            line = f"warning: {row.name}: {sentence(row.found, row.fix)}"
            console.print(line, style="yellow", markup=False, highlight=False)
