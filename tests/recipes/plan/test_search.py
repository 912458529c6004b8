import itertools
from dataclasses import replace

import pytest

from recipes.compose.recipe import compose_recipe
from recipes.config import OptimizerState, Recompute
from recipes.errors import ConfigError
from recipes.layout import check_layout, data_parallel, faults, world_size
from recipes.plan.candidates import topologies
from recipes.plan.memory import Verdict
from recipes.plan.search import Pricing, Sequences, exact, search
from recipes.schedule import lengths

LIMI = Sequences(range(78), lengths.quantiles(), "LIMI's")


def recipe(*words):
    return compose_recipe([f"model={words[0]}", *words[1:]])


@pytest.fixture(scope="module")
def glm():
    r = recipe("glm4.5")
    return r, search(r, LIMI)


def test_every_layout_it_tries_is_legal(glm):
    r, _ = glm
    tried = list(topologies(r, 152_000, 15))
    for one in tried:
        check_layout(one)
        assert world_size(one) == 64
        assert not one.layout.search
        assert one.layout.max_tokens_per_gpu * one.layout.cp >= 152_000
    for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "last_stage_layers"):
        assert len({getattr(one.layout, name) for one in tried}) > 1, name


def test_the_best_are_sorted_and_fit(glm):
    _, found = glm
    assert found.chosen is found.best[0] and len(found.best) == 10
    assert [o.seconds for o in found.best] == sorted(o.seconds for o in found.best)
    assert {o.verdict for o in found.best} == {Verdict.fits}


def test_no_other_value_of_an_axis_is_faster(glm):
    _, found = glm
    for name, other in found.other.items():
        assert other is None or other.seconds >= found.chosen.seconds, name


@pytest.mark.parametrize(
    "words",
    [
        ["qwen3-8b"],
        ["qwen3-4b", "cluster=h100x1"],
        pytest.param(["qwen3-4b", "cluster=h200x1"], marks=pytest.mark.slow),
        pytest.param(["qwen3-8b", "engine=megatron"], marks=pytest.mark.slow),
    ],
)
def test_it_finds_what_trying_everything_exactly_finds(words):
    """On up to eight GPUs every legal layout can be simulated."""
    r = recipe(*words)
    pricing = Pricing(r, LIMI)
    fastest = None
    for one in topologies(r, pricing.longest, pricing.smallest):
        for recompute, offload, state in itertools.product(Recompute, (False, True), OptimizerState):
            changed = replace(one.layout, recompute=recompute, offload=offload, optimizer_state=state)
            tried = replace(one, layout=changed)
            if next(faults(tried), None) is not None:
                continue
            try:
                option = exact(tried, pricing)
            except ConfigError:
                continue
            if option.verdict is Verdict.fits and (fastest is None or option.seconds < fastest.seconds):
                fastest = option
    assert fastest is not None
    assert search(r, LIMI).chosen.seconds == pytest.approx(fastest.seconds, rel=0.02)


@pytest.mark.parametrize("name", ["tp", "pp", "cp", "recompute", "optimizer_state"])
def test_a_fixed_value_stays(name):
    value = {"tp": 8, "pp": 2, "cp": 4, "recompute": Recompute.full, "optimizer_state": OptimizerState.offloaded}[name]
    r = recipe("qwen3-32b", f"layout.{name}={getattr(value, 'value', value)}")
    assert r.layout.fixed == [name]
    assert {getattr(o.recipe.layout, name) for o in search(r, LIMI).best} == {value}


def test_offloading_alone_may_be_fixed():
    found = search(recipe("qwen3-4b", "cluster=h200x1", "layout.offload=true"), LIMI)
    assert {o.recipe.layout.offload for o in found.best} == {True} and found.chosen.verdict is Verdict.fits
    with pytest.raises(ConfigError, match=r"offload is the embedded engine's"):
        search(recipe("qwen3-8b", "layout.offload=true"), LIMI)
    with pytest.raises(ConfigError, match=r"recompute selective keeps more; write layout\.recompute=linear"):
        search(recipe("qwen3-4b", "cluster=h200x1", "layout.offload=true", "layout.recompute=selective"), LIMI)


def test_degrees_that_leave_nothing_are_named():
    with pytest.raises(ConfigError, match=r"layout=auto with layout\.tp=8 layout\.pp=4: .* does not divide 8 ranks"):
        search(recipe("qwen3-8b", "layout.tp=8", "layout.pp=4"), LIMI)
    with pytest.raises(
        ConfigError, match=r"no cp lets layout\.max_tokens_per_gpu=1024 hold the longest .* 152,000 tokens"
    ):
        search(recipe("qwen3-8b", "layout.max_tokens_per_gpu=1024"), LIMI)
    with pytest.raises(ConfigError, match="steps of 15 sequences with layout.dp=64; leave out some"):
        search(recipe("qwen3-32b", "layout.dp=64"), LIMI)


def test_a_fixed_dp_and_cap_are_kept():
    found = search(recipe("qwen3-32b", "layout.dp=2", "layout.max_tokens_per_gpu=40960"), LIMI)
    assert {data_parallel(o.recipe) for o in found.best} == {2}
    assert {o.recipe.layout.max_tokens_per_gpu for o in found.best} == {40_960}


def test_600_gpus_are_not_slower_than_64():
    many = search(recipe("qwen3-32b", "cluster.nodes=75"), LIMI).chosen
    assert many.seconds < search(recipe("qwen3-32b"), LIMI).chosen.seconds / 3
