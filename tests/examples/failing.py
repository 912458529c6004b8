"""Slow tests, of which one fails whenever it is run, one the first time, and one where another ran before it."""

from pathlib import Path

import pytest

RUNS: list[str] = []


def first(name: str) -> bool:
    """Whether it is a test's first run in this folder."""
    path = Path(f"{name}.ran")
    ran = path.exists()
    path.touch()
    return not ran


@pytest.mark.slow
def test_fails() -> None:
    RUNS.append("fails")
    raise AssertionError("always")


@pytest.mark.slow
def test_flakes() -> None:
    RUNS.append("flakes")
    assert not first("flakes")


@pytest.mark.slow
def test_fails_after_others() -> None:
    assert not RUNS


@pytest.mark.slow
def test_passes() -> None:
    pass
