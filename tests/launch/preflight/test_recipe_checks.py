import io
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch.checks import Outcome
from launch.cli import train
from launch.preflight import cluster_checks as on_cluster
from launch.preflight import machine, recipe_checks
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, DataError, PreflightError
from recipes.plan.saves import saves
from tests.launch.checks import GLM, checked, odd, overrides, red
from tests.launch.support import called, limi, recipe_of


def test_a_good_recipe_is_green_and_every_row_says_what_it_protects_from(root):
    rows = checked(root, *GLM)
    assert red(rows) == []
    assert [name for name, row in rows.items() if (row.outcome is Outcome.shown)] == ["host memory"], (
        "its limit is not known here"
    )
    assert all(row.protects_from and row.figure for row in rows.values())


# Words that make one row red, the row, and what its fix says.
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
    words, row, fix = WORDS[name]
    rows = checked(root, *GLM, *words)
    assert red(rows) == [row]
    assert fix in rows[row].fix
    kept = [w for w in words if "engine.args." not in w]  # a misspelt name is left out
    assert red(checked(root, *GLM, *kept, *overrides(rows[row].fix))) == []


LAYOUTS = {
    "tp does not divide the heads": (
        ["cluster.gpus_per_node=3", "layout.ep=1"],
        {"tp": 3, "sp": True, "etp": 3},
        "layout.tp=1 layout.sp=false layout.etp=1",
    ),
    "ep x etp x pp is over the world": (["layout.ep=1"], {"ep": 4}, "write layout.ep=2"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_fails_on_the_gpus_is_refused(root, name):
    words, layout, fix = LAYOUTS[name]
    rows = checked(root, *GLM, *words, **layout)
    assert red(rows) == ["layout"]
    assert fix in rows["layout"].fix
    assert rows["GPU memory"].figure == "not known until what failed passes"
    with pytest.raises(ConfigError, match=re.escape(fix.split()[0])):
        compose_recipe([*GLM, *words, *(f"layout.{k}={str(v).lower()}" for k, v in layout.items())])


def test_the_mend_of_a_layout_mends_it(root):
    rows = checked(root, *GLM, ep=4)
    assert red(checked(root, *GLM, *overrides(rows["layout"].fix))) == []


def test_a_warm_up_passed_on_to_slime_is_refused(root):
    row = checked(root, *GLM, "engine.args.lr_warmup_fraction=0.1")["warm-up"]
    assert row.failed and "leave out engine.args.lr_warmup_fraction" in row.fix
    assert not recipe_checks.warmup_once(compose_recipe([*GLM, "optim.warmup_fraction=0.1"])).failed, "typed once"
    assert not recipe_checks.warmup_once(
        compose_recipe(["model=qwen3-4b", "experiment=released", "cluster=h100x64"])
    ).failed


def test_every_wrong_flag_is_named(root):
    row = checked(root, *GLM, "engine.args.swigluu=true", "engine.args.lr=1")["flags"]
    assert "swigluu" in row.figure and "engine.args.lr=1" in row.figure


def test_a_relative_path_in_a_ray_job_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"cluster.root={root}", "data.path=my.jsonl", "model.checkpoint=./base", "data.heldout=their/own"]
    assert not recipe_checks.paths(compose_recipe(words)).failed, "outside a job it is a path from here"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    row = recipe_checks.paths(compose_recipe(words))
    assert "data.path=/FOLDER/my.jsonl" in row.fix and "model.checkpoint=/FOLDER/base" in row.fix
    assert "data.heldout" not in row.fix, "an id on the hub"
    Path("their/own").mkdir(parents=True)
    assert "data.heldout=/FOLDER/own" in recipe_checks.paths(compose_recipe(words)).fix, "a folder of that name"
    assert not recipe_checks.paths(
        compose_recipe([words[0], *overrides(recipe_checks.paths(compose_recipe(words)).fix)])
    ).failed
    out = compose_recipe([words[0], "data.out=packed/sets"])
    assert "data.out" in recipe_checks.paths(out).fix, "written to, so that it is no id"


@pytest.mark.parametrize(("spans", "what"), [([], "none in a"), ([(0, 2)], "the first token in a")])
def test_sequences_that_slime_would_train_wrongly_are_refused(spans, what):
    def packed(spans):
        return {"training": SimpleNamespace(ids=["b", "a"], spans=lambda s: spans if s else [(1, 3)])}

    assert recipe_checks.supervision(packed([(2, 4)])).figure == "4"
    row = recipe_checks.supervision(packed(spans))
    assert row.failed and row.figure == what


def test_a_run_that_goes_on_needs_no_second_room_for_what_it_has(tmp_path, monkeypatch):
    recipe = compose_recipe(["model=qwen3-tiny", "engine=slime", f"cluster.root={tmp_path}", "run=room"])
    one = saves(recipe, 400)
    full = shutil.disk_usage("/")._replace(free=one.checkpoint + one.export)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert recipe_checks.room(recipe, recipe_checks.Known()).failed
    checkpoints = tmp_path / "runs" / "room" / "checkpoints"
    for step in (99, 199):
        (checkpoints / f"iter_{step:07}").mkdir(parents=True)
        with (checkpoints / f"iter_{step:07}" / ".metadata").open("wb") as file:
            file.truncate(one.checkpoint)
    assert not recipe_checks.room(recipe, recipe_checks.Known()).failed
    assert recipe_checks.room(replace(recipe, anew=True), recipe_checks.Known()).failed, "it moves aside and stays"


def test_a_disk_without_room_for_the_checkpoints_is_refused(root, monkeypatch):
    words = [*GLM, "engine.save_steps=1"]
    checked(root, *words)  # packs the data, for which there must be room
    one = saves(compose_recipe(words), 400)
    free = shutil.disk_usage("/")._replace(free=int(2.5 * one.checkpoint + one.export))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    rows = checked(root, *words)
    assert red(rows) == ["disk"]
    assert rows["disk"].limit.endswith("2 checkpoints kept, one being written, and the export")
    assert rows["disk"].fix.startswith("write engine.keep_last=1, make room in")
    assert red(checked(root, *words, "engine.keep_last=1")) == []
    rows = checked(root, *GLM, "engine.save_steps=1000")
    assert red(rows) == [] and rows["disk"].limit.endswith("1 checkpoint kept, one being written, and the export"), (
        "saved once, at the end"
    )


def test_memory_that_the_plan_passes_is_refused(root, monkeypatch):
    monkeypatch.setattr(machine, "gpus_here", lambda: 2)
    rows = checked(root, *GLM, "gpu.memory_mib=1", "cluster.host_memory_gb=0.1")
    assert red(rows) == ["machine", "GPU memory", "host memory"]
    assert rows["GPU memory"].limit == "0.001 GB" and "stage 0: does not fit" in rows["GPU memory"].figure
    assert "choose a smaller model" in rows["host memory"].fix


def test_a_check_that_fails_leaves_the_others_standing(root, base):
    (base / "config.json").write_text("{")

    def pack():
        raise DataError("'x' holds no trajectory")

    rows = {
        r.name: r
        for r in recipe_checks.recipe_rows(
            compose_recipe([*GLM, f"model.checkpoint={base}", f"cluster.root={root}"]), pack
        )
    }
    assert red(rows) == ["data", "model", "code"]
    assert rows["data"].figure == "'x' holds no trajectory"
    assert rows["model"].figure == f"'{base / 'config.json'}' is cut off in line 1"
    assert (rows["steps"].outcome is Outcome.shown) and rows["layout"].outcome is Outcome.passed


def test_make_check_of_the_embedded_engine(root):
    done = called("check", f"cluster.root={root}")
    assert done.returncode == 0, done.stderr
    assert "GPU memory" in done.stdout and "flags" not in done.stdout and "nodes" not in done.stdout.split("disk")[1]
    words = ["optim.warmup_steps=5", "optim.warmup_fraction=0.1", "layout.max_tokens_per_gpu=1000"]
    done = called("check", f"cluster.root={root}", *words)
    assert done.returncode == 2
    assert "PreflightError: 2 of " in done.stderr
    assert "\n  warm-up: " in done.stderr and "\n  micro-batches: " in done.stderr


@pytest.mark.slow
def test_make_check_of_slime_starts_a_ray_of_this_machine(root, tmp_path):
    words = [f"cluster.root={root}", "engine=slime", f"engine.python={sys.executable}", f"engine.slime_root={tmp_path}"]
    words += ["layout.max_tokens_per_gpu=1000"]
    wide = {**os.environ, "COLUMNS": "400"}  # no cell of the table in two lines
    done = limi("check", *words, f"engine.megatron_root={tmp_path}/none", env=wide)
    assert done.returncode == 2
    red = re.findall(r"^  ([\w-]+): ", done.stderr, re.M)
    assert [name for name in red if name != "numpy"] == ["micro-batches", "Megatron-LM", "contract"]
    assert f"no folder {tmp_path}/none" in done.stderr
    assert "on the bus of 2 ranks, over gloo" in done.stdout


# Words that a plan warns of, the row, what is found, and what its fix says.
ODD = {
    "a warm-up that is longer than the run": (
        ["optim.warmup_steps=500"], "learning rate",
        "warm-up takes 500 of 400 steps (125%), more than half: the highest rate is 0.00479, in step 400, and never optim.lr 0.006",
        "optim.warmup_steps=40"),
    "a warm-up of most of the run": (
        ["optim.warmup_steps=390"], "learning rate",
        "warm-up takes 390 of 400 steps (98%), more than half: the rate falls for hardly any of them", "optim.warmup_steps=40"),
    "a fraction that wins": (
        ["optim.warmup_fraction=0.1"], "warm-up", "warmup_fraction 0.1 wins over warmup_steps 40, and the first step's rate",
        "optim.warmup_fraction=null"),
    "a rate too large": (
        ["optim.lr=0.02"], "learning rate", "optim.lr 0.02 is over 0.01: it moves every weight", "optim.lr=1e-5"),
    "a batch of more than the data": (
        ["optim.batch_size=64"], "batch size",
        "optim.batch_size 64 is more than the 20 trajectories of an epoch: every step holds all", "optim.batch_size=20"),
    "a host that is nearly full": (
        ["cluster.host_memory_gb=0.9"], "host memory", "a node's host needs 0.8 of its 0.9 GB, more than 80%",
        "name nodes with more memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_the_plan_warns_of_is_said_and_refuses_nothing(root, name):
    words, row, found, fix = ODD[name]
    rows = checked(root, *words)
    assert red(rows) == [] and odd(rows) == [row]
    assert rows[row].figure.startswith(found) and fix in rows[row].fix
    assert odd(checked(root, *words, *overrides(rows[row].fix))) in ([], [row] if row == "host memory" else [])


def test_what_the_plan_warns_of_stands_in_the_place_of_the_plain_row(root, monkeypatch):
    monkeypatch.setattr(machine, "gpus_here", lambda: 2)
    recipe, data, _ = recipe_of(root, "optim.warmup_fraction=0.1", "cluster.host_memory_gb=0.9")
    names = [row.name for row in recipe_checks.recipe_rows(recipe, lambda: {"training": data})]
    assert names.count("warm-up") == names.count("host memory") == 1


def test_what_no_plan_can_be_made_of_is_not_warned_of(root):
    rows = checked(root, *GLM, "cluster.gpus_per_node=8", "optim.batch_size=4", "optim.lr=0.02")
    assert red(rows) == ["steps"] and odd(rows) == []


def test_make_check_says_what_is_odd_and_passes(root):
    done = called("check", f"cluster.root={root}", "optim.batch_size=64", env={**os.environ, "COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^warn  batch size +optim\.batch_size 64 is more than", done.stdout, re.M)
    assert (
        "\nwarning: batch size: optim.batch_size 64 is more than the 20 trajectories of an epoch: every step holds all; "
        in (done.stdout)
    )
    assert "write optim.batch_size=20" in done.stdout


@pytest.mark.run
def test_training_says_what_is_odd_once_before_it_starts(root):
    """Ended by a step's limit, before its first checkpoint."""
    words = ["run=odd", "optim.warmup_steps=500", "optim.epochs=1", "engine.timeout=1", "engine.max_retries=0"]
    done = limi(f"cluster.root={root}", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        done.stdout.count("warning: learning rate: warm-up takes 500 of 5 steps (10000%), more than half: the highest")
        == 1
    )
    assert done.stdout.index("warning: ") < done.stdout.index("odd: 5 steps on 2 ranks")


def test_training_through_slime_says_it_too_and_refuses_before_ray_starts(root, monkeypatch):
    asked = []
    monkeypatch.setattr(on_cluster, "connected_rows", lambda *_: asked.append(1) or [])
    console = Console(file=io.StringIO(), width=400)
    recipe = compose_recipe([*GLM, f"cluster.root={root}", "optim.batch_size=64"])
    assert train._through_slime_plan(recipe, console).schedule.num_steps == 80
    assert (
        console.file.getvalue().count("warning: batch size: optim.batch_size 64 is more than the 20 trajectories") == 1
    )
    assert asked == [1]
    with pytest.raises(PreflightError, match="micro-batches"):
        train._through_slime_plan(replace(recipe, layout=replace(recipe.layout, max_tokens_per_gpu=1024)), console)
    assert asked == [1]
