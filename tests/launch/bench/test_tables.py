"""The tables of figures have the rows that their commands print today: one that is added, renamed or gone makes a table stale."""

import re

import pytest

from launch.bench import parity
from launch.bench.gpu.cases import CASES
from recipes.paths import REPO
from tests.launch.slime import test_on_cpu

BENCH = REPO / "launch" / "bench"


def rows(path, head):
    """The first cells of the table whose first head is this one."""
    text = path.read_text(encoding="utf-8")
    lines = text.partition(f"| {head} |")[2].splitlines()[2:]
    table = "\n".join(lines).split("\n\n")[0]
    return [cell.strip() for cell in re.findall(r"^\| (.*?) \|", table, re.M)]


@pytest.mark.parametrize(
    ("path", "head", "names"),
    [
        (BENCH / "PARITY.md", "layout", {*parity.LAYOUTS}),
        (BENCH / "PARITY.md", "bf16", {*parity.BF16_LAYOUTS, "Qwen3 one rank, beside fp32", "GLM one rank, beside fp32"}),
        (BENCH.parent / "slime" / "PARITY.md", "layout", {*test_on_cpu.LAYOUTS}),
        (BENCH / "GPU.md", "row", {*(case.name for case in CASES if "beside" not in case.name), "to reach"}),
    ],
    ids=["parity", "bf16", "slime", "gpu"],
)  # fmt: skip
def test_a_table_has_the_rows_of_today(path, head, names):
    assert sorted(rows(path, head)) == sorted(names)


def test_the_layouts_whose_speed_is_shown_are_there():
    assert {*rows(BENCH / "FIGURES.md", "layout")} <= {*parity.LAYOUTS}
