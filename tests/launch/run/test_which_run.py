"""The run that a command names, and its checkpoints."""

import json

import pytest

from data_prep.files import write_text
from launch.run import which_run
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.config import Mtp
from recipes.errors import CheckpointError, ConfigError


def test_the_recipe_is_the_run_s_own_and_no_word_is_half_obeyed(tmp_path):
    here = [f"cluster.root={tmp_path}", "run=first"]
    trained = compose_recipe([*here, "model=glm4.5-tiny", "optim.lr=1"])
    trained.cluster.root = "/elsewhere"
    write_text(tmp_path / "runs" / "first" / "config.yaml", to_yaml(trained))
    own = which_run.own_recipe(compose_recipe([*here, "step=3", "model.mtp=drop", "model.checkpoint=/base"]))
    assert (own.model.name, own.optim.lr, own.cluster.root) == ("glm4.5-tiny", 1.0, str(tmp_path))
    assert (own.model.mtp, own.model.checkpoint) == (Mtp.drop, "/base")
    assert which_run.own_recipe(compose_recipe(here)).model == trained.model
    with pytest.raises(ConfigError, match=r"optim\.lr: the recipe is the run's own"):
        which_run.own_recipe(compose_recipe([*here, "optim.lr=2"]))
    with pytest.raises(ConfigError, match=r"no run '.*nosuch'; write run=NAME, one of: first$"):
        which_run.own_recipe(compose_recipe([here[0], "run=nosuch"]))


def test_checkpoints_of_slime_count_once_all_ranks_wrote_them(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint$"):
        which_run.pick(tmp_path, None)
    for last in (4, 9, 14):
        (tmp_path / "checkpoints" / f"iter_{last:07}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"iter_{last:07}" / ".metadata").touch()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
    assert which_run.pick(tmp_path, None) == (10, tmp_path / "checkpoints" / "iter_0000009")
    assert which_run.pick(tmp_path, 5)[1].name == "iter_0000004"
    with pytest.raises(CheckpointError, match="it has checkpoints of step 5, 10"):
        which_run.pick(tmp_path, 15)
    write_text(tmp_path / "plan.json", json.dumps({"steps": {"count": 10}}))
    assert [which_run.target(tmp_path, n).name for n in (5, 10)] == ["hf-step000005", "hf"]


def export_in(folder, *names):
    for name in names or ("config.json", "model.safetensors.index.json"):
        write_text(folder / name, "{}")
    return folder


def test_an_export_in_a_run_has_the_run_s_own_recipe(tmp_path):
    trained = compose_recipe([f"cluster.root={tmp_path}/old", "model=glm4.5-tiny", "optim.lr=1", "run=first"])
    run = tmp_path / "moved" / "runs" / "second"
    write_text(run / "config.yaml", to_yaml(trained))
    hf, early = export_in(run / "hf"), export_in(run / "hf-step000005", "config.json", "model.safetensors")
    here = f"cluster.root={tmp_path / 'moved'}"
    own, folder = which_run.exported(compose_recipe([f"checkpoint={early}"]))
    assert folder == early
    assert (own.model.name, own.optim.lr, own.run) == ("glm4.5-tiny", 1.0, "second")
    assert own.cluster.root == str(tmp_path / "moved")
    own, folder = which_run.exported(compose_recipe([here, "run=second", "sanity.port=1234", "model.checkpoint=/base"]))
    assert (folder, own.sanity.port, own.model.checkpoint, own.gpu.name) == (hf, 1234, "/base", "cpu")
    own, _ = which_run.exported(
        compose_recipe([f"checkpoint={hf}", "cluster=h100x8", "cluster.gpus_per_node=4", "engine.python=/py"])
    )
    assert (own.gpu.name, own.cluster.gpus_per_node, own.engine.python, own.optim.lr) == ("h100", 4, "/py", 1.0)
    for word in ("optim.lr=2", "cluster.gpus_per_node=4"):
        with pytest.raises(ConfigError, match=rf"{word.partition('=')[0]}: the recipe is the run's own"):
            which_run.exported(compose_recipe([f"checkpoint={hf}", word]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sanity: {oops: 1}", "' is no recipe of this version: "),
        ("sanity: {port: 1}", "' is no recipe of this version: "),
        ("{", "', line 1: expected the node content, but found '<stream end>'; fix it there"),
    ],
)
def test_a_recipe_of_another_version_is_named(tmp_path, text, says):
    hf = export_in(tmp_path / "runs" / "old" / "hf")
    write_text(hf.parent / "config.yaml", text)
    with pytest.raises(ConfigError, match=rf"runs/old/config\.yaml{says}"):
        which_run.exported(compose_recipe([f"checkpoint={hf}"]))


def test_an_export_in_no_run_wants_to_be_told_its_model(tmp_path):
    folder = export_in(tmp_path / "elsewhere")
    words = [f"checkpoint={folder}", f"cluster.root={tmp_path}"]
    with pytest.raises(ConfigError, match="belongs to no run.*write model=NAME"):
        which_run.exported(compose_recipe(words))
    recipe, found = which_run.exported(compose_recipe([*words, "model=glm4.5-tiny"]))
    assert (recipe.model.name, found) == ("glm4.5-tiny", folder)


def test_a_folder_without_weights_is_refused_with_the_exports_there(tmp_path):
    whole = export_in(tmp_path / "runs" / "good" / "hf")
    here = [f"cluster.root={tmp_path}", "run=half"]
    export_in(tmp_path / "half", "config.json")
    with pytest.raises(
        CheckpointError, match=rf"'.*/half' has no model\.safetensors\.index\.json; .* one of: {whole}$"
    ):
        which_run.exported(compose_recipe([*here, f"checkpoint={tmp_path / 'half'}"]))
    with pytest.raises(
        CheckpointError, match=r"runs/half/hf' has no config\.json and no model\.safetensors\.index\.json"
    ):
        which_run.exported(compose_recipe(here))
