"""Slow tests of which two pass and one is skipped, one that is not slow, and one of the contract."""

import pytest


def test_quick() -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two::[x y]"])
def test_slow(name: str) -> None:
    pass


@pytest.mark.slow
def test_skipped() -> None:
    pytest.skip("no GPU here")


@pytest.mark.slow
@pytest.mark.contract
def test_contract() -> None:
    raise AssertionError("it is not to be run")
