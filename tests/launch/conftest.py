"""Shared by the tests of training."""

import pytest

from tests.launch.support import finish, metrics_of, start


@pytest.fixture(scope="session")
def uninterrupted(root):
    """Metrics of the short run `whole` under `root`, which nothing disturbed."""
    code, output = finish(start(root, "run=whole"))
    assert code == 0, output
    return metrics_of(root / "runs" / "whole")
