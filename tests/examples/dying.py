"""Slow tests, of which the second takes pytest with it."""

import os

import pytest


@pytest.mark.slow
def test_before() -> None:
    pass


@pytest.mark.slow
def test_dies() -> None:
    os._exit(3)


@pytest.mark.slow
def test_after() -> None:
    pass
