import pytest

from launch.preflight import check_memory
from recipes.compose import compose_recipe
from recipes.errors import PreflightError
from tests.launch.support import limi


def test_a_model_that_this_machine_cannot_hold_is_refused_with_the_figures():
    with pytest.raises(PreflightError, match=r"glm4\.5 needs at least 8,468 GB on 2 ranks .*model=qwen3-tiny"):
        check_memory(compose_recipe(["model=glm4.5", "cluster=local", "layout=data_parallel"]))
    check_memory(compose_recipe([]))


def test_a_real_model_without_its_checkpoint_is_refused_before_anything_starts(tmp_path):
    done = limi("model=qwen3-32b", "cluster=local", "layout=data_parallel", "data=sample", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert (
        "model.checkpoint=Qwen/Qwen3-32B is not on this machine; run `make fetch MODEL=qwen3-32b cluster=local"
        in done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_is_refused(bases, tmp_path):
    done = limi(
        "model=qwen3-tiny",
        "model.layers=2",
        f"model.checkpoint={bases['glm4.5-tiny']}",
        "model.random_init=false",
        f"cluster.root={tmp_path}",
    )
    assert done.returncode == 2
    assert "model_type is 'glm4_moe', the recipe's model.family is qwen3" in done.stderr
    assert "write model.layers=3" in done.stderr


def test_a_mistyped_checkpoint_is_refused_and_not_made(tmp_path):
    done = limi("data", f"model.checkpoint={tmp_path}/typo", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert f"no tokenizer.json in '{tmp_path}/typo'; write model.checkpoint=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())
