"""Lost nodes are said, awaited for as long as the recipe says, and then end the run with what to type."""

import contextlib
import itertools

import pytest

from launch.slime.failure import NAME, failure
from launch.slime.hooks import nodes
from recipes.compose.recipe import compose_recipe
from recipes.errors import NodeLostError

RECIPE = compose_recipe(
    ["engine=slime", "gpu=h100", "cluster.nodes=2", "cluster.gpus_per_node=8", "engine.node_timeout=1"]
)


def node(address, gpus=8, alive=True):
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"GPU": gpus} if gpus else {}}


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ([node("a"), node("b")], ""),
        ([node("head", 0), node("a"), node("b")], ""),
        ([node("a"), node("b"), node("c", alive=False)], ""),
        ([node("a"), node("b", alive=False)], "1 of 2 nodes with 8 GPUs are in the cluster; lost: b"),
        ([node("a"), node("b", 4)], "1 of 2 nodes with 8 GPUs are in the cluster"),
        ([node("a"), node("b", alive=False), node("b")], ""),  # back under its address
        ([], "0 of 2 nodes with 8 GPUs are in the cluster"),
    ],
)
def test_what_is_missing_is_said(there, says):
    assert nodes.shortage(RECIPE, there) == says


class Ended(Exception):
    pass


def watched(tmp_path, series):
    """Watch nodes that change as the series says; return what the run folder said at each look, and the exit status."""
    said, looks = [], iter(series)

    def look():
        if (tmp_path / nodes.SHORTAGE).exists():
            said.append((tmp_path / nodes.SHORTAGE).read_text())
        try:
            return next(looks)
        except StopIteration:
            raise Ended from None

    status = []
    with contextlib.suppress(Ended):
        nodes.watch(tmp_path, RECIPE, look, status.append, poll_s=0.3)
    return said, status


def test_a_node_that_comes_back_in_time_ends_nothing(tmp_path):
    both, one = [node("a"), node("b")], [node("a"), node("b", alive=False)]
    said, status = watched(tmp_path, [both, one, one, both, both])
    missing = "1 of 2 nodes with 8 GPUs are in the cluster; lost: b"
    assert said == ["", "", missing, missing, "", ""] and status == []


def test_a_node_that_stays_away_ends_the_run_with_what_to_type(tmp_path):
    one = [node("a"), node("b", alive=False)]
    _, status = watched(tmp_path, itertools.chain([[node("a"), node("b")]], itertools.repeat(one, 20)))
    assert status == [1]
    assert (tmp_path / NAME).exists()

    class Run:
        root = tmp_path

    raised = failure(Run, tmp_path / "train.log", 0, 1, 3)
    assert isinstance(raised, NodeLostError)
    assert raised.problem == "1 of 2 nodes with 8 GPUs are in the cluster; lost: b, for engine.node_timeout=1 s"
    assert "ray start --address" in raised.fix and "cluster.nodes=N" in raised.fix
