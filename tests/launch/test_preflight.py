import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from launch import preflight, preflight_checkpoint
from launch.checklist import Found, check, refuse, table
from launch.preflight import check_memory
from recipes.compose import compose_recipe
from recipes.errors import ConfigError, DataError, PreflightError
from recipes.memory import disk
from tests.launch.support import limi, recipe_of

GLM = ("model=glm4.5-tiny", "engine=slime", "cluster.gpus_per_node=2")


def checked(root, *words, **layout):
    """Rows by name. layout: values that composing a recipe would refuse already."""
    recipe, data, heldout = recipe_of(root, *words)
    recipe = replace(recipe, layout=replace(recipe.layout, **layout))
    return {row.name: row for row in preflight.rows(recipe, lambda: {"training": data, "held out": heldout})}


def red(rows):
    return [name for name, row in rows.items() if row.red]


def overrides(mend):
    """What a mend says to write, before what else one could."""
    name = r"\b((?:model|optim|layout|engine|cluster|data)\.[\w.-]+)"
    found = dict(re.findall(name + r"=([^\s,;]+)", mend.split(", or ")[0]))
    return [f"{name}={value}" for name, value in found.items()]


@pytest.fixture
def base(bases, tmp_path):
    """A checkpoint of the tiny GLM to spoil."""
    return Path(shutil.copytree(bases["glm4.5-tiny"], tmp_path / "base"))


def test_a_good_recipe_is_green_and_every_row_says_what_it_protects_from(root):
    rows = checked(root, *GLM)
    assert red(rows) == []
    assert [name for name, row in rows.items() if not row.judged] == ["host memory"], "its limit is not known here"
    assert all(row.protects and row.found for row in rows.values())


CONFIGS = {
    "top-k": ({"num_experts_per_tok": 3}, "model.top_k=3"),
    "experts": ({"n_routed_experts": 8}, "model.experts=8"),
    "query groups": ({"num_key_value_heads": 4}, "model.kv_heads=4"),
    "vocabulary": ({"vocab_size": 1024}, "model.vocab=1024"),
    "QK-norm": ({"use_qk_norm": False}, "model.qk_norm=false"),
    "rotary fraction": ({"partial_rotary_factor": None}, "model.rope_fraction=1.0"),
}


def changed(folder, fields):
    """Sets fields of a config.json, or takes them out where the value is None."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        for where in (config, config.get("rope_parameters") or {}):
            where.pop(name, None)
        if value is not None:
            config[name] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_not_the_checkpoints_is_refused_and_the_mend_mends_it(base, name):
    fields, mend = CONFIGS[name]
    words = [*GLM, f"model.checkpoint={base}"]
    assert not preflight_checkpoint.model(compose_recipe(words)).red
    changed(base, fields)
    row = preflight_checkpoint.model(compose_recipe(words))
    assert row.red and f"write {mend}" in row.mend
    assert not preflight_checkpoint.model(compose_recipe([*words, *overrides(row.mend)])).red


def test_every_difference_is_in_the_one_row(base):
    changed(base, {name: value for fields, _ in CONFIGS.values() for name, value in fields.items()})
    row = preflight_checkpoint.model(compose_recipe([*GLM, f"model.checkpoint={base}"]))
    assert len(row.found.splitlines()) == len(CONFIGS)
    assert all(mend in row.mend for _, mend in CONFIGS.values())


def test_a_field_that_a_checkpoint_lacks_is_refused(base):
    changed(base, {"use_qk_norm": None})
    row = preflight_checkpoint.model(compose_recipe([*GLM, f"model.checkpoint={base}"]))
    assert "use_qk_norm is missing" in row.found and "model.checkpoint=FOLDER of a glm4.5-tiny" in row.mend


@pytest.mark.parametrize("name", CONFIGS)
def test_the_release_of_glm_is_told_from_one_with_a_field_changed(reference, tmp_path, name):
    folder = Path(shutil.copytree(reference / "hf_configs" / "glm4.5", tmp_path / "glm"))
    recipe = compose_recipe(["model=glm4.5", f"model.checkpoint={folder}"])
    assert not preflight_checkpoint.model(recipe).red
    fields = CONFIGS[name][0]
    changed(folder, {n: v and v + 1 for n, v in fields.items()} if name != "QK-norm" else fields)
    assert preflight_checkpoint.model(recipe).red


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


def test_a_checkpoint_with_code_is_refused(base):
    assert not preflight_checkpoint.code(base).red
    (base / "deep").mkdir()
    (base / "deep" / "modeling.py").touch()
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(settings | {"auto_map": {"AutoModel": "modeling.Model"}}))
    row = preflight_checkpoint.code(base)
    assert row.found == "deep/modeling.py, auto_map in config.json, auto_map in tokenizer_config.json"
    assert f"remove deep/modeling.py from {base}" in row.mend
    assert f"take auto_map out of {base / 'config.json'}" in row.mend


def test_weights_that_are_not_whole_are_refused(base):
    assert not preflight_checkpoint.weights(base).red
    mtp, main = base / "mtp-3.safetensors", base / "model.safetensors"
    whole = main.read_bytes()
    main.write_bytes(whole[:-1])
    assert "1 of 2 files: model.safetensors: " in preflight_checkpoint.weights(base).found
    main.write_text("version https://git-lfs.github.com/spec/v1")
    assert preflight_checkpoint.weights(base).red
    main.write_bytes(mtp.read_bytes())
    assert "model.safetensors: lacks " in preflight_checkpoint.weights(base).found
    main.write_bytes(whole)
    mtp.unlink()
    row = preflight_checkpoint.weights(base)
    assert row.found == "1 of 2 files: mtp-3.safetensors: missing" and "download" in row.mend
    (base / preflight_checkpoint.INDEX).unlink()
    assert not preflight_checkpoint.weights(base).red, "one file needs no index"
    mtp.write_bytes(whole)
    assert "no model.safetensors.index.json" in preflight_checkpoint.weights(base).found
    mtp.unlink()
    main.unlink()
    assert preflight_checkpoint.weights(base).found == "no *.safetensors"


def test_the_tokenizer_of_another_model_and_another_template_are_refused(root, bases, base):
    _, data, _ = recipe_of(root, *GLM)
    packed = {"training": data}
    recipe = compose_recipe([*GLM, f"model.checkpoint={base}"])
    assert not preflight_checkpoint.tokenizer(recipe, packed).red
    (base / "chat_template.jinja").write_text("{{ messages }}")
    row = preflight_checkpoint.tokenizer(recipe, packed)
    assert row.found == "training data has another chat_template.jinja" and "make data" in row.mend
    other = compose_recipe([f"model.checkpoint={bases['qwen3-tiny']}"])
    assert "another chat_template.jinja, tokenizer.json" in preflight_checkpoint.tokenizer(other, packed).found


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


def test_all_red_rows_are_in_the_one_error():
    rows = [
        check(name, "nothing")(lambda mend=mend: Found("3", "2", mend))()
        for name, mend in [("a", "write a=2"), ("b", ""), ("c", "write c=2")]
    ]
    with pytest.raises(
        PreflightError,
        match=r"2 of 3 checks failed:\n  a: 3 \(limit: 2\)\n    protects from nothing\n    → write a=2\n  c: (.*\n)+    → write c=2$",
    ):
        refuse(rows)
    refuse(rows[1:2])


def test_the_table_has_a_line_a_check_and_one_for_what_is_not_known():
    rows = [
        check(name, "harm")(lambda _: Found("3", "2"))(known) for name, known in [("a", 1), ("b", None), ("c", None)]
    ]
    shown = []
    for width in (80, 160):
        console = Console(width=width, file=io.StringIO())
        console.print(table(rows, console.width))
        shown.append([line.rstrip() for line in console.file.getvalue().splitlines()])
    assert len(shown[0]) == len(shown[1]) == 4
    assert shown[0][2].split() == ["pass", "a", "3", "(2)"] and shown[1][2].endswith("harm")
    assert shown[0][3].endswith("not known without what is red: b, c")


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
