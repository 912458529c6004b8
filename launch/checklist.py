"""Checks that end in a row each: what was found, within which limit, and what mends it. None keeps the others from being made."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from recipes.errors import LimiError, PreflightError


@dataclass(frozen=True)
class Found:
    """What a check saw. mend: the override or command that mends it, empty where nothing is wrong. judged: whether it is
    checked at all, or only shown."""

    text: str
    limit: str = ""
    mend: str = ""
    judged: bool = True


@dataclass(frozen=True)
class Row:
    """A check with its outcome; protects: from what it protects a run."""

    name: str
    protects: str
    found: str
    limit: str
    mend: str
    judged: bool

    @property
    def red(self) -> bool:
        return bool(self.mend)


def check(name: str, protects: str) -> Callable[[Callable[..., Found]], Callable[..., Row]]:
    """Makes a row of a function that looks: an error that it raises is a red one. Where an argument is None, which a check before
    it could not find out, the row says so and is not judged: that check is red."""

    def made(look: Callable[..., Found]) -> Callable[..., Row]:
        @functools.wraps(look)
        def row(*arguments: object) -> Row:
            if any(a is None for a in arguments):
                found = Found("not known without what is red", judged=False)
            else:
                found = _looked(look, arguments)
            return Row(name, protects, found.text, found.limit, found.mend, found.judged)

        return row

    return made


def _looked(look: Callable[..., Found], arguments: Sequence[object]) -> Found:
    try:
        return look(*arguments)
    except LimiError as error:
        # The project's messages end with what to type.
        text, _, mend = str(error).rpartition("; ")
        return Found(text or mend, mend=mend)
    except Exception as error:  # whatever a machine may have in store: the other checks go on
        return Found(
            f"{type(error).__name__}: {error}", mend="the check itself could not be made: mend what its error names"
        )


def table(rows: Sequence[Row]) -> Table:
    out = Table(
        title="Before a GPU is held", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, expand=True
    )
    out.add_column("", width=4)
    out.add_column("check, protects from", ratio=3)
    out.add_column("found, mended by", ratio=4, overflow="fold")
    out.add_column("limit", ratio=3, overflow="fold")
    for r in rows:
        mark = Text("FAIL", "bold red") if r.red else Text("pass", "green") if r.judged else Text("–", "dim")
        found = Text(r.found)
        if r.red:
            found.append(f"\n→ {r.mend}", "yellow")
        out.add_row(mark, Text(r.name, "bold").append(f": {r.protects}", "not bold dim"), found, r.limit)
    return out


def refuse(rows: Sequence[Row]) -> None:
    """Raises `PreflightError` with every red row and what mends it."""
    red = [f"  {r.name}: {r.found}{f' (limit: {r.limit})' if r.limit else ''}; {r.mend}" for r in rows if r.red]
    if red:
        raise PreflightError("\n".join([f"{len(red)} of {len(rows)} checks failed:", *red]))
