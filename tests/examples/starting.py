"""Tests that start Ray, with a marker and without."""

import contextlib
import subprocess

import pytest


def start() -> None:
    with contextlib.suppress(Exception):  # as much code has it
        subprocess.run(["/nowhere/raylet", "--node"], check=False)


@pytest.fixture
def cluster() -> None:
    start()


def test_quick() -> None:
    pass


def test_unmarked() -> None:
    start()


def test_unmarked_with_a_fixture(cluster: None) -> None:
    pass


@pytest.mark.run
def test_run(cluster: None) -> None:
    start()


@pytest.mark.slow
def test_slow() -> None:
    start()
