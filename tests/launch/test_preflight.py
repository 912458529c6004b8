import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import preflight
from launch.preflight import check_memory
from recipes.compose import compose_recipe
from recipes.errors import ConfigError, DataError, PreflightError
from recipes.memory import disk
from tests.launch.checks import GLM, checked, overrides, red
from tests.launch.support import limi


def test_a_good_recipe_is_green_and_every_row_says_what_it_protects_from(root):
    rows = checked(root, *GLM)
    assert red(rows) == []
    assert [name for name, row in rows.items() if not row.judged] == ["host memory"], "its limit is not known here"
    assert all(row.protects and row.found for row in rows.values())


# Words that make one row red, the row, and what its mend says.
WORDS = {
    "batch below data parallel": (
        ["cluster.gpus_per_node=8", "optim.batch_size=4"], "steps", "optim.batch_size=8"),
    "misspelt flag": (
        ["engine.args.manual_gc_intervall=5"], "flags", "engine.args.manual-gc-interval=5"),
    "warm-up twice": (
        ["optim.warmup_steps=5", "optim.warmup_fraction=0.1"], "warm-up", "optim.warmup_fraction=null"),
    "micro-batch below the longest": (
        ["layout.max_tokens_per_gpu=1024"], "micro-batches", "layout.max_tokens_per_gpu=1664"),
    "beyond the context": (
        ["model.native_context=1000"], "context", "model.rope=yarn model.rope_factor=1.54"),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_that_slime_would_take_are_refused_and_the_mend_mends_them(root, name):
    words, row, mend = WORDS[name]
    rows = checked(root, *GLM, *words)
    assert red(rows) == [row]
    assert mend in rows[row].mend
    kept = [w for w in words if "engine.args." not in w]  # a misspelt name is left out
    assert red(checked(root, *GLM, *kept, *overrides(rows[row].mend))) == []


LAYOUTS = {
    "tp does not divide the heads": (
        ["cluster.gpus_per_node=3", "layout.ep=1"],
        {"tp": 3, "sp": True, "etp": 3},
        "layout.tp=2",
    ),
    "ep x etp x pp is over the world": (["layout.ep=1"], {"ep": 4}, "layout.ep=2 layout.etp=1"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_fails_on_the_gpus_is_refused(root, name):
    words, layout, mend = LAYOUTS[name]
    rows = checked(root, *GLM, *words, **layout)
    assert red(rows) == ["layout"]
    assert mend in rows["layout"].mend
    assert rows["GPU memory"].found == "not known without what is red"
    with pytest.raises(ConfigError, match=re.escape(mend.split()[0])):
        compose_recipe([*GLM, *words, *(f"layout.{k}={str(v).lower()}" for k, v in layout.items())])


def test_the_mend_of_a_layout_mends_it(root):
    rows = checked(root, *GLM, ep=4)
    assert red(checked(root, *GLM, *overrides(rows["layout"].mend))) == []


def test_a_warm_up_passed_on_to_slime_is_refused(root):
    row = checked(root, *GLM, "engine.args.lr_warmup_fraction=0.1")["warm-up"]
    assert row.red and "leave out engine.args.lr_warmup_fraction" in row.mend
    assert not preflight.warmup_once(compose_recipe([*GLM, "optim.warmup_fraction=0.1"])).red, "typed once"
    assert not preflight.warmup_once(compose_recipe(["model=qwen3-4b", "experiment=released", "cluster=h100x64"])).red


def test_every_wrong_flag_is_named(root):
    row = checked(root, *GLM, "engine.args.swigluu=true", "engine.args.lr=1")["flags"]
    assert "swigluu" in row.found and "engine.args.lr=1" in row.found


def test_a_relative_path_in_a_ray_job_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"cluster.root={root}", "data.path=my.jsonl", "model.checkpoint=./base", "data.heldout=their/own"]
    assert not preflight.paths(compose_recipe(words)).red, "outside a job it is a path from here"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    row = preflight.paths(compose_recipe(words))
    assert "data.path=/FOLDER/my.jsonl" in row.mend and "model.checkpoint=/FOLDER/base" in row.mend
    assert "data.heldout" not in row.mend, "an id on the hub"
    Path("their/own").mkdir(parents=True)
    assert "data.heldout=/FOLDER/own" in preflight.paths(compose_recipe(words)).mend, "a folder of that name"
    assert not preflight.paths(compose_recipe([words[0], *overrides(preflight.paths(compose_recipe(words)).mend)])).red
    out = compose_recipe([words[0], "data.out=packed/sets"])
    assert "data.out" in preflight.paths(out).mend, "written to, so that it is no id"


@pytest.mark.parametrize(("spans", "what"), [([], "none in a"), ([(0, 2)], "the first token in a")])
def test_sequences_that_slime_would_train_wrongly_are_refused(spans, what):
    def packed(spans):
        return {"training": SimpleNamespace(ids=["b", "a"], spans=lambda s: spans if s else [(1, 3)])}

    assert preflight.supervision(packed([(2, 4)])).found == "4"
    row = preflight.supervision(packed(spans))
    assert row.red and row.found == what


def test_a_run_that_goes_on_needs_no_second_room_for_what_it_has(tmp_path, monkeypatch):
    recipe = compose_recipe(["model=qwen3-tiny", "engine=slime", f"cluster.root={tmp_path}", "run=room"])
    one = disk(recipe)
    full = shutil.disk_usage("/")._replace(free=one.checkpoint + one.export)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert preflight.room(recipe, preflight.Known()).red
    checkpoints = tmp_path / "runs" / "room" / "checkpoints"
    for step in (99, 199):
        (checkpoints / f"iter_{step:07}").mkdir(parents=True)
        with (checkpoints / f"iter_{step:07}" / ".metadata").open("wb") as file:
            file.truncate(one.checkpoint)
    assert not preflight.room(recipe, preflight.Known()).red
    (tmp_path / "runs" / "room" / "report.html").write_text("finished: it moves aside and stays")
    assert preflight.room(recipe, preflight.Known()).red


def test_a_disk_without_room_for_the_checkpoints_is_refused(root, monkeypatch):
    words = [*GLM, "engine.save_steps=1"]
    checked(root, *words)  # packs the data, for which there must be room
    one = disk(compose_recipe(words))
    free = shutil.disk_usage("/")._replace(free=int(2.5 * one.checkpoint + one.export))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    rows = checked(root, *words)
    assert red(rows) == ["disk"]
    assert rows["disk"].limit.endswith("3 checkpoints and the export")
    assert rows["disk"].mend.startswith("write engine.keep_last=1, make room in")
    assert red(checked(root, *words, "engine.keep_last=1")) == []
    rows = checked(root, *GLM, "engine.save_steps=1000")
    assert red(rows) == [] and rows["disk"].limit.endswith("1 checkpoint and the export"), "saved once, at the end"


def test_memory_that_the_plan_passes_is_refused(root):
    rows = checked(root, *GLM, "gpu.memory_mib=1", "cluster.host_memory_gb=0.1")
    assert red(rows) == ["GPU memory", "host memory"]
    assert rows["GPU memory"].limit == "0.001 GB" and "stage 0: does not fit" in rows["GPU memory"].found
    assert "choose a smaller model" in rows["host memory"].mend


def test_a_check_that_fails_leaves_the_others_standing(root, base):
    (base / "config.json").write_text("{")

    def pack():
        raise DataError("'x' holds no trajectory")

    rows = {
        r.name: r
        for r in preflight.rows(compose_recipe([*GLM, f"model.checkpoint={base}", f"cluster.root={root}"]), pack)
    }
    assert red(rows) == ["data", "model", "code"]
    assert rows["data"].found == "'x' holds no trajectory"
    assert rows["model"].found.startswith("JSONDecodeError: ")
    assert not rows["steps"].judged and rows["layout"].judged


def test_make_check_of_the_embedded_engine(root):
    done = limi("check", f"cluster.root={root}")
    assert done.returncode == 0, done.stderr
    assert "GPU memory" in done.stdout and "flags" not in done.stdout and "nodes" not in done.stdout.split("disk")[1]
    words = ["optim.warmup_steps=5", "optim.warmup_fraction=0.1", "layout.max_tokens_per_gpu=1000"]
    done = limi("check", f"cluster.root={root}", *words)
    assert done.returncode == 2
    assert "PreflightError: 2 of " in done.stderr
    assert "\n  warm-up: " in done.stderr and "\n  micro-batches: " in done.stderr


@pytest.mark.slow
def test_make_check_of_slime_starts_a_ray_of_this_machine(root, tmp_path):
    words = [f"cluster.root={root}", "engine=slime", f"engine.slime_root={tmp_path}", "layout.max_tokens_per_gpu=1000"]
    wide = {**os.environ, "COLUMNS": "400"}  # no cell of the table in two lines
    done = limi("check", *words, f"engine.megatron_root={tmp_path}/none", env=wide)
    assert done.returncode == 2
    red = re.findall(r"^  ([\w-]+): ", done.stderr, re.M)
    assert [name for name in red if name != "numpy"] == ["micro-batches", "slime", "Megatron-LM"]
    assert f"no folder {tmp_path}/none" in done.stderr
    assert "on the bus of 2 ranks, by" in done.stdout


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
