"""The run that a command names, and its checkpoints."""

import json

import pytest

from data_prep.files import write_text
from launch import checkpoints
from recipes.compose import compose_recipe, to_yaml
from recipes.config import Mtp
from recipes.errors import CheckpointError, ConfigError


def test_the_recipe_is_the_run_s_own_and_no_word_is_half_obeyed(tmp_path):
    here = [f"cluster.root={tmp_path}", "run=first"]
    trained = compose_recipe([*here, "model=glm4.5-tiny", "optim.lr=1"])
    trained.cluster.root = "/elsewhere"
    write_text(tmp_path / "runs" / "first" / "config.yaml", to_yaml(trained))
    own = checkpoints.own_recipe(compose_recipe([*here, "step=3", "model.mtp=drop", "model.checkpoint=/base"]))
    assert (own.model.name, own.optim.lr, own.cluster.root) == ("glm4.5-tiny", 1.0, str(tmp_path))
    assert (own.model.mtp, own.model.checkpoint) == (Mtp.drop, "/base")
    assert checkpoints.own_recipe(compose_recipe(here)).model == trained.model
    with pytest.raises(ConfigError, match=r"optim\.lr: the recipe is the run's own"):
        checkpoints.own_recipe(compose_recipe([*here, "optim.lr=2"]))
    with pytest.raises(ConfigError, match=r"no run '.*nosuch'; write run=NAME, one of: first$"):
        checkpoints.own_recipe(compose_recipe([here[0], "run=nosuch"]))


def test_checkpoints_of_slime_count_once_all_ranks_wrote_them(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint$"):
        checkpoints.pick(tmp_path, None)
    for last in (4, 9, 14):
        (tmp_path / "checkpoints" / f"iter_{last:07}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"iter_{last:07}" / ".metadata").touch()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
    assert checkpoints.pick(tmp_path, None) == (10, tmp_path / "checkpoints" / "iter_0000009")
    assert checkpoints.pick(tmp_path, 5)[1].name == "iter_0000004"
    with pytest.raises(CheckpointError, match="there are those of step 5, 10"):
        checkpoints.pick(tmp_path, 15)
    write_text(tmp_path / "plan.json", json.dumps({"steps": {"count": 10}}))
    assert [checkpoints.target(tmp_path, n).name for n in (5, 10)] == ["hf-step000005", "hf"]
