"""A run is another where what it must keep is another, however far it has come; where it lies and how it is run is not of it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from launch.run import same_run
from launch.run.run_folder import RECORD
from launch.run.run_state import Reached
from launch.run.same_run import with_layout_of_run
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.layout import data_parallel
from recipes.paths import run_folder
from tests.launch.states import content, run_in, save
from tests.launch.support import limi, recipe_of


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run whose data and base are its own: its words, its folder, and the files of its data."""
    folder = tmp_path_factory.mktemp("same")
    sample = compose_recipe([]).data
    files = [Path(shutil.copy(path, folder)) for path in (sample.path, str(sample.heldout))]
    base = f"model.checkpoint={shutil.copytree(recipe_of(root)[0].model.checkpoint, folder / 'base')}"
    words = ["run=same", f"cluster.root={folder}", base, f"data.path={files[0]}", f"data.heldout={files[1]}"]
    recipe, run = run_in(Reached.passed, folder, *words)
    return recipe.overrides, run.root, files


def asked(words, *more) -> Recipe:
    named = {word.partition("=")[0] for word in more}
    return compose_recipe([*(w for w in words if w.partition("=")[0] not in named), *more])


@pytest.mark.parametrize(
    "word",
    [
        "engine.timeout=9", "engine.max_retries=0", "engine.save_steps=7", "engine.keep_last=1", "engine.spike=null",
        "sanity.timeout=600", "sanity.min_tool_calls=0.5", "sanity.port=4711", "cluster.gpus_per_node=1", "cluster.env.A=1",
        "layout.tp=2", "layout.max_tokens_per_gpu=4096", "gpu.hour_price=2", "data.workers=1", "data.max_rejected=3",
        "model.mtp=drop",
    ],
)  # fmt: skip
def test_how_it_is_run_and_checked_makes_no_other_run(finished, word):
    words, *_ = finished
    same_run.refuse_another(asked(words, word))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["optim.lr=0.5"], r"optim\.lr=0\.006 there, 0\.5 here"),
        (["seed=7", "optim.epochs=5"], r"seed=0 there, 7 here; optim\.epochs=4 there, 5 here"),
        (["model.layers=5"], r"model\.layers=4 there, 5 here"),
        (["engine.dtype=bf16"], r"engine\.dtype=fp32 there, bf16 here"),
        (["data.turns=last_segment"], r"data\.turns=all there, last_segment here"),
        (["data.heldout=null"], r"data\.heldout=/.*heldout\.jsonl there, None here"),
        (["data.path=/no/where.jsonl"], r"data\.path=/.*train\.jsonl there, /no/where\.jsonl here"),
        (["model.checkpoint=/no/where"], r"model\.checkpoint=/.*base there, /no/where here"),
    ],
)
def test_what_a_run_keeps_is_named_with_both_values_and_what_to_write(finished, more, says):
    words, root, _ = finished
    fix = "write run=OTHER, or anew=true, which moves that folder aside and trains from the first step"
    with pytest.raises(ConfigError, match=rf"'{root}' holds a run of another recipe \({says}\); {fix}$"):
        same_run.refuse_another(asked(words, *more))


def test_the_same_trajectories_elsewhere_are_the_same_run_and_others_in_their_place_are_not(finished, tmp_path):
    words, _, (train, heldout) = finished
    moved = shutil.copy(train, tmp_path / "renamed.jsonl")
    same_run.refuse_another(asked(words, f"data.path={moved}"))
    with pytest.raises(
        ConfigError, match=r"data\.path=.* there, .*, and its content differs from the trajectories trained on"
    ):
        same_run.refuse_another(asked(words, f"data.path={heldout}"))
    kept = train.read_bytes()
    try:
        train.write_bytes(kept + kept.splitlines(keepends=True)[0])
        with pytest.raises(ConfigError, match=rf"data\.path={train} there, {train} here, and its content differs"):
            same_run.refuse_another(asked(words))
    finally:
        train.write_bytes(kept)
    same_run.refuse_another(asked(words))


def test_another_chat_template_is_another_run(finished):
    words, root, _ = finished
    template = root.parents[1] / "base" / "chat_template.jinja"
    kept = template.read_text()
    try:
        template.write_text(kept + "\n{# mine #}")
        with pytest.raises(ConfigError, match=r"\(chat_template\.jinja of model\.checkpoint=.*base differ"):
            same_run.refuse_another(asked(words))
    finally:
        template.write_text(kept)


def test_where_data_and_base_are_gone_their_names_are_compared(finished, tmp_path):
    words, root, _ = finished
    run = tmp_path / "runs" / "same"
    shutil.copytree(root, run)
    plan = json.loads((run / "plan.json").read_text())
    for name in ("data", "heldout"):
        plan[name]["folder"] = f"/gone/{name}"
    (run / "plan.json").write_text(json.dumps(plan))
    config = (run / "config.yaml").read_text()
    for here in [w.partition("=")[2] for w in words if w.startswith(("data.", "model.checkpoint="))]:
        config = config.replace(here, f"/gone{here}")
    (run / "config.yaml").write_text(config)
    gone = [re.sub("=/", "=/gone/", w, count=1) for w in words if w.startswith(("data.", "model.checkpoint="))]
    same_run.refuse_another(asked(words, f"cluster.root={tmp_path}", *gone))
    with pytest.raises(ConfigError, match=r"data\.path=/gone/.* there, /elsewhere here\)"):
        same_run.refuse_another(asked(words, f"cluster.root={tmp_path}", *gone[:1], "data.path=/elsewhere", *gone[2:]))


def test_what_was_fetched_from_the_hub_is_known_by_its_id_once_it_is_removed(finished, tmp_path):
    words, root, _ = finished
    run = tmp_path / "runs" / "same"
    shutil.copytree(root, run)
    plan = json.loads((run / "plan.json").read_text())
    plan["data"]["folder"] = "/gone"
    (run / "plan.json").write_text(json.dumps(plan))
    config = (run / "config.yaml").read_text()
    base, data = (
        next(w.partition("=")[2] for w in words if w.startswith(f"{n}=")) for n in ("model.checkpoint", "data.path")
    )
    config = config.replace(base, f"{tmp_path}/models/Qwen--Qwen3")
    config = config.replace(data, f"{tmp_path}/data-sources/GAIR--LIMI/limi.json")
    (run / "config.yaml").write_text(config)
    here = [f"cluster.root={tmp_path}", "model.checkpoint=Qwen/Qwen3", "data.path=GAIR/LIMI"]
    same_run.refuse_another(asked(words, *here))
    with pytest.raises(ConfigError, match=r"data\.path=.*limi\.json there, GAIR/other here"):
        same_run.refuse_another(asked(words, *here[:2], "data.path=GAIR/other"))


@pytest.mark.run
@pytest.mark.parametrize("engine", ["engine=megatron", "engine=slime"])
def test_the_command_refuses_another_recipe_before_anything_else_and_changes_nothing(root, tmp_path, engine):
    for state in (Reached.begun, Reached.trained, Reached.passed):
        recipe, run = run_in(state, root, f"run=refused-{tmp_path.name}-{state.name}", engine)
        save(run, 10)
        before = content(run.root)
        done = limi("train", *recipe.overrides, "optim.lr=0.5")
        assert done.returncode == 2
        assert "(optim.lr=0.006 there, 0.5 here); write run=OTHER, or anew=true" in done.stderr
        assert not done.stdout
        assert content(run.root) == before


def began(root, *words):
    """A run of slime with a whole checkpoint, begun with these words."""
    recipe = compose_recipe([f"cluster.root={root}", "run=grown", *SLIME, *words])
    folder = run_folder(recipe)
    (folder / "checkpoints" / "iter_0000004").mkdir(parents=True)
    for name in (".metadata", RECORD):
        (folder / "checkpoints" / "iter_0000004" / name).write_text("{}")
    (folder / "config.yaml").write_text(to_yaml(recipe))
    return recipe


SLIME = ["model=qwen3-4b", "engine=slime", "cluster=h100x64"]
BEGAN = ["layout=released-qwen3-4b", "layout.tp=2", "layout.pp=1", "layout.cp=4"]


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_a_run_goes_on_in_its_layout_with_fewer_nodes_or_more(tmp_path, nodes):
    began(tmp_path, *BEGAN)
    again = compose_recipe([f"cluster.root={tmp_path}", "run=grown", *SLIME, f"cluster.nodes={nodes}", "layout=auto"])
    found = with_layout_of_run(again)
    assert (found.layout.search, found.layout.tp, found.layout.cp) == (False, 2, 4)
    assert data_parallel(found) == nodes


def test_what_does_not_go_on_is_said_with_what_does(tmp_path):
    began(tmp_path, *BEGAN)
    words = [f"cluster.root={tmp_path}", "run=grown", *SLIME]
    with pytest.raises(ConfigError, match="layout.tp=2 there, 4 here") as raised:
        with_layout_of_run(compose_recipe([*words, "layout=auto", "layout.tp=4"]))
    assert "leave out layout.tp" in raised.value.fix
    with pytest.raises(ConfigError, match="8 GPUs each, and 12 GPUs are no multiple") as raised:
        with_layout_of_run(compose_recipe([*words, "layout=auto", "cluster.gpus_per_node=4", "cluster.nodes=3"]))
    assert "cluster.nodes=2" in raised.value.fix
    fresh = compose_recipe([*words, "layout=auto", "layout.tp=4", "anew=true"])
    assert with_layout_of_run(fresh) is fresh
