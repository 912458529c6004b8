"""A run goes on in another layout than the one that wrote its checkpoint."""

import pytest

from tests.launch.support import ranks_of

QWEN = ["model=qwen3-tiny", "model.layers=4", "optim.warmup_steps=0"]
GLM = ["model=glm4.5-tiny", "model.layers=4", "layout=data_parallel", "optim.warmup_steps=0"]
SAVED, STEPS = 2, 5
CHANGES = {
    "TP2 to DP2": (QWEN, 2, "layout.tp=2", 2, ""),
    "DP2 to PP2": (QWEN, 2, "", 2, "layout.pp=2"),
    "PP2 to TP2 SP": (QWEN, 2, "layout.pp=2", 2, "layout.tp=2 layout.sp=true"),
    "TP2 PP2 to one rank": (QWEN, 4, "layout.tp=2 layout.pp=2", 1, ""),
    "CP2 to PP2 VPP2": (QWEN, 2, "layout.cp=2", 2, "layout.pp=2 layout.vpp=2"),
    "one rank to PP2 of 1 and 3 layers": (QWEN, 1, "", 2, "layout.pp=2 layout.first_stage_layers=1"),
    "GLM DP2 EP2 to PP2 EP2": (GLM, 2, "layout.ep=2", 4, "layout.pp=2 layout.ep=2"),
    "GLM EP2 to TP2 SP EP2": (GLM, 2, "layout.ep=2", 2, "layout.tp=2 layout.sp=true layout.ep=2"),
    "GLM PP2 to DP2": (GLM, 2, "layout.pp=2", 2, ""),
}
QUICK = ["TP2 to DP2", "GLM EP2 to TP2 SP EP2"]
# A checkpoint's model is one for both; only the last layout's ranks differ.
_BASE = "model.checkpoint={root}/models/change-{name}"


def words(root, model, ranks, layout):
    checkpoint = _BASE.format(root=root, name=model[0].partition("=")[2])
    return [*model, checkpoint, f"cluster.gpus_per_node={ranks}", *layout.split()]


def losses(ranks, first):
    return [ranks.call("train_step", step)[0]["loss"] for step in range(first, STEPS)]


def gone_on(root, tmp_path, name):
    """Largest difference of the losses after the change from those without it."""
    model, before, old, after, new = CHANGES[name]
    with ranks_of(root, *words(root, model, before, old)) as (_, ranks):
        for step in range(SAVED):
            ranks.call("train_step", step)
        ranks.call("save", str(tmp_path), SAVED)
        unchanged = losses(ranks, SAVED)
    with ranks_of(root, *words(root, model, after, new)) as (_, ranks):
        assert set(ranks.call("load", str(tmp_path))) == {SAVED}
        changed = losses(ranks, SAVED)
    return max(abs(a - b) for a, b in zip(unchanged, changed, strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_a_changed_layout_goes_on_within_1e_4(root, tmp_path, name):
    assert gone_on(root, tmp_path, name) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CHANGES if n not in QUICK])
def test_every_changed_layout_goes_on_within_1e_4(root, tmp_path, name):
    assert gone_on(root, tmp_path, name) < 1e-4


def test_another_ep_takes_the_weights_when_asked(root, tmp_path):
    """The first loss after it is that of the same weights; the optimizer is new."""
    with ranks_of(root, *words(root, GLM, 2, "layout.ep=2")) as (_, ranks):
        for step in range(SAVED):
            ranks.call("train_step", step)
        ranks.call("save", str(tmp_path), SAVED)
        unchanged = losses(ranks, SAVED)
    with ranks_of(root, *words(root, GLM, 2, ""), "engine.resume=weights") as (_, ranks):
        assert set(ranks.call("load", str(tmp_path))) == {SAVED}
        changed = losses(ranks, SAVED)
    assert abs(changed[0] - unchanged[0]) < 1e-5
    assert abs(changed[1] - unchanged[1]) > 1e-3, "Adam's moments are not those of the checkpoint"
