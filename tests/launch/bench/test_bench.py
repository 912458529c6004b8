"""Every kind of row of the engine's bench, and of the sandbox's, measured for real on little."""

import pytest

from launch.bench import engine_bench
from launch.bench.bench import sandbox_rows
from launch.sanity.loop import sandbox
from tests.launch.support import POOL


@pytest.fixture(autouse=True)
def alone():
    """A process has one Ray at a time, and the bench starts its own."""
    POOL.close()


@pytest.mark.slow
def test_layouts_of_one_process_are_measured_one_after_the_other(root):
    names = ["Qwen3 DP2", "Qwen3 untied TP2 SP", "GLM EP2"]
    rows = list(engine_bench.layout_rows(root, names))
    assert [row[:2] for row in rows] == [(name, "2") for name in names]
    assert all(int(row[2].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
def test_a_checkpoint_is_measured_beside_a_copy(root):
    copy, save, load = engine_bench.checkpoint_rows(root, ["model=qwen3-tiny", "run=benched"], rounds=1)
    assert " MB, synced" in copy[0]
    assert all("×" in row[1] and row[2] == "at most 2 ×" for row in (save, load))
    assert not (root / "copy").exists()


@pytest.mark.slow
def test_the_parts_of_a_start_are_seen_and_the_run_ends(root):
    engine_bench.plan_of(root, ["model=qwen3-tiny"], "qwen3-tiny")
    parts = engine_bench._start(root)
    assert list(parts) == ["imports and data", "plan", "ranks", "held-out loss", "first step"]
    assert all(seconds > 0 for seconds in parts.values())


@pytest.mark.run
def test_a_sandbox_s_start_and_calls_are_measured():
    if why := sandbox.available():
        pytest.skip(why)
    rows = list(sandbox_rows())
    assert [row[0].partition(",")[0] for row in rows] == ["its start", "a call of read_file", "a call of run"]
    assert all(float(row[1].removesuffix(" s")) > 0 for row in rows)
