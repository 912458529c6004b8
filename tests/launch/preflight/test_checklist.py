"""Rows of checks: what an error makes of one, what the table shows, and what is refused or warned of."""

import io

import pytest
from rich.console import Console

from launch.checks import table, warn
from launch.preflight.checklist import Found, check, refuse
from recipes.errors import PreflightError


def test_all_red_rows_are_in_the_one_error():
    rows = [
        check(name, "nothing")(lambda fix=fix: Found("3", "2", fix))()
        for name, fix in [("a", "write a=2"), ("b", ""), ("c", "write c=2")]
    ]
    with pytest.raises(
        PreflightError,
        match=r"2 of 3 checks failed:\n  a: 3 \(limit: 2\)\n    protects from nothing\n    → write a=2\n  c: (.*\n)+    → write c=2$",
    ):
        refuse(rows)
    refuse(rows[1:2])


def test_the_table_has_a_line_a_check_and_one_for_what_is_not_known():
    rows = [
        check(name, "harm")(lambda _: Found("3", "2"))(known) for name, known in [("a", 1), ("b", None), ("c", None)]
    ]
    shown = []
    for width in (80, 160):
        console = Console(width=width, file=io.StringIO())
        console.print(table("Before a run", rows, console.width))
        shown.append([line.rstrip() for line in console.file.getvalue().splitlines()])
    assert len(shown[0]) == len(shown[1]) == 4
    assert shown[0][2].split() == ["pass", "a", "3", "(2)"] and shown[1][2].endswith("harm")
    assert shown[0][3].endswith("not known until what failed passes: b, c")


def test_an_odd_row_is_shown_and_said_and_refuses_nothing():
    rows = [
        check("a", "harm")(lambda: Found("3", "2", "write a=2", odd=True))(),
        check("b", "harm")(lambda: Found("1"))(),
    ]
    assert (rows[0].failed, rows[0].warned, rows[1].warned) == (False, True, False)
    refuse(rows)
    console = Console(width=80, file=io.StringIO())
    console.print(table("Before a run", rows, console.width))
    warn(rows, console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[2].split() == ["warn", "a", "3", "(2)"]
    assert lines[4:] == ["warning: a: 3; write a=2"]
