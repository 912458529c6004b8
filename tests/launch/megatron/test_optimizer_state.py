"""A checkpoint holds the whole optimizer state, whichever ranks wrote it: any layout goes on from it."""

import contextlib

import pytest

from launch.bench import parity
from tests.launch.support import ranks_of

pytestmark = pytest.mark.run

# Layout that saves, layout that goes on. Tensors reach over two and over four data-parallel ranks.
PAIRS = [("GLM TP2 SP EP2", "GLM DP2")]
# By ranks, for whose number the pool starts its processes anew: two, two and four, four, four and two.
MORE = [
    ("Qwen3 TP2 SP", "Qwen3 PP2 VPP2"),
    ("Qwen3 PP2 VPP2", "Qwen3 PP2 of 1 and 3 layers"),
    ("GLM DP2", "GLM EP2"),
    ("Qwen3 untied PP2", "Qwen3 untied TP2 SP"),
    ("GLM DP2", "GLM TP2 SP ETP2"),
    ("GLM EP2", "GLM EP4"),
    ("Qwen3 DP4", "Qwen3 TP2 PP2"),
    ("GLM EP4", "GLM PP4"),
    ("Qwen3 CP2 PP2", "Qwen3 DP4"),
    ("GLM TP2 SP DP2 EP4", "GLM EP4"),
    ("GLM EP4", "GLM TP2 SP CP2 linear recomputation, all offloaded"),
    ("GLM TP2 SP CP2 EP2", "GLM DP2"),
    ("GLM TP2 SP DP2", "GLM DP2"),
    ("GLM PP4", "GLM TP2 SP"),
    ("GLM TP2 SP DP2", "GLM TP2 SP"),
    ("GLM TP2 SP CP2 ETP4", "GLM TP2 SP"),
    ("GLM EP2 PP2", "GLM TP2 SP EP2"),
    ("GLM TP2 SP CP2 linear recomputation, all offloaded", "GLM DP2"),
]


@contextlib.contextmanager
def ranks_in(root, name):
    base = "untied" if "untied" in name else name.split()[0]
    with ranks_of(root, *parity.words_of(name), f"model.checkpoint={root}/models/{base}") as (_, ranks):
        yield ranks


def steps(ranks, first):
    lines = [ranks.call("train_step", step)[0] for step in range(first, first + 2)]
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(("saves", "goes_on"), [*PAIRS, *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)])
def test_any_layout_goes_on_from_a_checkpoint(root, tmp_path, saves, goes_on):
    with ranks_in(root, saves) as ranks:
        steps(ranks, 0)
        ranks.call("save", str(tmp_path), 2)
        wanted = steps(ranks, 2)
    for name in (saves, goes_on):
        with ranks_in(root, name) as ranks:
            assert ranks.call("load", str(tmp_path))[0] == 2
            found = steps(ranks, 2)
        if name == saves:
            assert found == wanted, "bit for bit"
        for (loss, norm), (same_loss, same_norm) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(same_loss, abs=1e-4)
            assert norm == pytest.approx(same_norm, rel=1e-4)


@pytest.mark.parametrize(("saves", "goes_on"), [("offloaded", "resident"), ("resident", "offloaded")])
def test_a_state_goes_on_the_same_on_the_host_and_on_the_gpu(root, tmp_path, saves, goes_on):
    def ranks_with(state):
        words = [*parity.QWEN, "engine.dtype=bf16", "cluster.gpus_per_node=1", f"layout.optimizer_state={state}"]
        return ranks_of(root, *words, f"model.checkpoint={root}/models/Qwen3-bf16")

    with ranks_with(saves) as (_, ranks):
        steps(ranks, 0)
        ranks.call("save", str(tmp_path), 2)
        wanted = steps(ranks, 2)
    with ranks_with(goes_on) as (_, ranks):
        assert ranks.call("load", str(tmp_path))[0] == 2
        assert steps(ranks, 2) == wanted, "bit for bit"
