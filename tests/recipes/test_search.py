from dataclasses import replace

import pytest

from recipes import lengths
from recipes.compose import compose_recipe
from recipes.config import OptimizerState, Recompute
from recipes.errors import ConfigError
from recipes.layout import check_layout, world_size
from recipes.memory import Verdict
from recipes.search import Pricing, Sequences, exact, search, topologies

LIMI = Sequences(range(78), lengths.quantiles(), "LIMI's")


def recipe(*words):
    return compose_recipe([f"model={words[0]}", *words[1:]])


@pytest.fixture(scope="module")
def glm():
    r = recipe("glm4.5")
    return r, search(r, LIMI)


def test_every_layout_it_tries_is_legal(glm):
    r, _ = glm
    tried = list(topologies(r, Pricing(r, LIMI)))
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


def test_it_finds_what_trying_everything_exactly_finds():
    """On eight GPUs every legal layout can be simulated."""
    r = recipe("qwen3-8b")
    pricing = Pricing(r, LIMI)
    fastest = None
    for one in topologies(r, pricing):
        for recompute in Recompute:
            for state in OptimizerState:
                tried = replace(one, layout=replace(one.layout, recompute=recompute, optimizer_state=state))
                try:
                    option = exact(tried, LIMI, pricing)
                except ConfigError:
                    continue
                if option.verdict is Verdict.fits and (fastest is None or option.seconds < fastest.seconds):
                    fastest = option
    assert search(r, LIMI).chosen.seconds == pytest.approx(fastest.seconds, rel=0.02)


@pytest.mark.parametrize("name", ["tp", "pp", "cp", "recompute", "optimizer_state"])
def test_a_fixed_value_stays(name):
    value = {"tp": 8, "pp": 2, "cp": 4, "recompute": Recompute.full, "optimizer_state": OptimizerState.offloaded}[name]
    r = recipe("qwen3-32b", f"layout.{name}={getattr(value, 'value', value)}")
    assert r.layout.fixed == [name]
    assert {getattr(o.recipe.layout, name) for o in search(r, LIMI).best} == {value}


def test_degrees_that_leave_nothing_are_named():
    with pytest.raises(
        ConfigError, match=r"no layout of 8 GPUs .* layout\.tp=8, layout\.pp=8; leave layout\. options out"
    ):
        search(recipe("qwen3-8b", "layout.tp=8", "layout.pp=8"), LIMI)
