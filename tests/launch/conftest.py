"""Shared by the tests of training."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.bench import parity
from tests.launch.one_rank import one_rank
from tests.launch.support import POOL, finish, metrics_of, start


@pytest.fixture(scope="session")
def megatron() -> Iterator[None]:
    """Megatron in this process, as one rank."""
    with one_rank():
        yield


@pytest.fixture(scope="session")
def uninterrupted(root):
    """Metrics of the short run `whole` under `root`, which nothing disturbed."""
    code, output = finish(start(root, "run=whole"))
    assert code == 0, output
    return metrics_of(root / "runs" / "whole")


@pytest.fixture(scope="session")
def on_one_rank(root):
    """By model, five steps of the embedded engine on one rank: what every layout is compared with."""
    return {model[0]: parity.one_rank(POOL, root, model, parity.EPS) for model in (parity.QWEN, parity.GLM)}


@pytest.fixture
def base(bases, tmp_path):
    """A checkpoint of the tiny GLM to spoil."""
    return Path(shutil.copytree(bases["glm4.5-tiny"], tmp_path / "base"))
