"""Shared by the tests of training."""

import pytest

from launch.megatron import parity
from tests.launch.support import POOL, finish, metrics_of, start


@pytest.fixture(scope="session")
def uninterrupted(root):
    """Metrics of the short run `whole` under `root`, which nothing disturbed."""
    code, output = finish(start(root, "run=whole"))
    assert code == 0, output
    return metrics_of(root / "runs" / "whole")


@pytest.fixture(scope="session")
def one_rank(root):
    """By model, five steps of the embedded engine on one rank: what every layout is compared with."""
    return {model[0]: parity.one_rank(POOL, root, model, parity.EPS) for model in (parity.QWEN, parity.GLM)}
