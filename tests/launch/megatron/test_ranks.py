"""What the driver says of ranks that cannot go on."""

import pytest

from launch.megatron import ranks as driver
from launch.megatron.ranks import leaner
from recipes.compose.recipe import compose_recipe
from recipes.errors import PreflightError, TrainError
from tests.launch import faulty
from tests.launch.support import POOL, ranks_of


def test_what_takes_less_memory_ends_at_fewer_tokens():
    """Each word is accepted, and the next one is another."""
    words, said = ["model=qwen3-4b", "cluster=h100x1", "layout=data_parallel"], []
    while (word := leaner(compose_recipe([*words, "layout.max_tokens_per_gpu=155648"]))).startswith(
        "layout."
    ) and "," not in word:
        words = [w for w in words if w.partition("=")[0] != word.partition("=")[0]] + [word]
        said.append(word.removeprefix("layout."))
    assert said == [
        "loss_chunk=4096",
        "recompute=linear",
        "offload=true",
        "optimizer_state=offloaded",
        "recompute=full",
    ]
    assert word == "layout.tp=2, or a smaller data.max_tokens"


def test_an_interface_that_is_not_here_is_named():
    ranks = driver.Ranks(compose_recipe(["cluster.interface=nosuch0"]))
    with pytest.raises(
        PreflightError, match=r"^cluster.interface=nosuch0 is not on this machine, which has .*lo.*; write cluster"
    ):
        ranks._start_workers()


@pytest.mark.slow
def test_a_gpu_without_room_is_named_with_what_to_type(root, monkeypatch):
    monkeypatch.setattr(driver, "Worker", faulty.OutOfMemory)
    with ranks_of(root, "cluster.gpus_per_node=1") as (_, ranks), pytest.raises(TrainError) as error:
        ranks.call("train_step", 0)
    assert "rank 0 ran out of GPU memory in 'train_step'" in str(error.value)
    assert str(error.value).endswith("Tried to allocate 2.00 GiB.; write layout.loss_chunk=4096")


@pytest.mark.slow
def test_gpus_that_ray_does_not_find_are_not_waited_for():
    POOL.close()  # a process has one Ray at a time
    recipe = compose_recipe(["model=qwen3-4b", "cluster=h100x8", "engine=megatron", "layout=data_parallel"])
    missing = "needs 8 GPUs, but Ray finds 0 on this machine; write cluster=local"
    with pytest.raises(PreflightError, match=missing), driver.Ranks(recipe):
        pass
