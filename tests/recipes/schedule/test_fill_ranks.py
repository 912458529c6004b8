"""Too few sequences for the ranks: what is offered was tried, and helps."""

from dataclasses import replace

import pytest

from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from recipes.schedule.fill_ranks import check_filled, remedy
from recipes.schedule.schedule import schedule_of
from tests.recipes.offered import offered, with_words


def checked(words, count, option="data.path"):
    r = compose_recipe(words)
    check_filled(r, schedule_of(r, range(count), [100] * count), option)


@pytest.mark.parametrize(
    ("words", "count", "fix"),
    [
        ([], 1, "write layout.cp=2"),
        (["layout.dp=2"], 1, "write layout.cp=2 layout.dp=1"),
        (["cluster.gpus_per_node=4"], 3, "write layout.cp=2"),
        (["cluster.gpus_per_node=4", "optim.batch_size=2"], 20, "write optim.batch_size=4"),
        (["cluster.gpus_per_node=3"], 2, "write cluster.gpus_per_node=2"),
        (["cluster.gpus_per_node=4", "layout.pp=2", "layout.vpp=2"], 2, "write layout.vpp=1"),
        (["layout.pp=2", "layout.vpp=2", "cluster.gpus_per_node=2"], 1, "write layout.vpp=1"),
        (["model=glm4.5-tiny", "cluster.gpus_per_node=8"], 4, "write layout.cp=2"),
        (["model=qwen3-4b", "cluster=h100x1", "cluster.gpus_per_node=8", "layout=data_parallel"], 3, "write layout.tp=4"),
    ],
)  # fmt: skip
def test_the_override_that_is_offered_helps(words, count, fix):
    with pytest.raises(ConfigError, match="cannot fill") as error:
        checked(words, count)
    assert error.value.fix == fix
    (alternative,) = offered(error.value)
    checked(with_words(words, alternative), count)


def test_held_out_data_is_no_matter_of_the_batch():
    with pytest.raises(ConfigError, match="cannot fill") as error:
        checked(["cluster.gpus_per_node=3"], 2, "data.heldout")
    assert error.value.fix == "write cluster.gpus_per_node=2"


def test_where_nothing_helps_more_data_is_asked_for():
    r = compose_recipe(["cluster.gpus_per_node=1"])
    schedule = replace(schedule_of(r, [0], [100]), micro_batch_multiple=2)  # as no layout of one rank is
    assert remedy(r, schedule) == "name a file with more trajectories as data.path"
    assert remedy(r, schedule, "data.heldout").endswith("as data.heldout, or write data.heldout=null")
