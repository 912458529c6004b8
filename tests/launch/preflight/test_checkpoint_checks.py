"""The checkpoint that training starts from: whole, of the recipe's model, with the data's tokenizer, and without code."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from launch.preflight import checkpoint_checks
from launch.run.fetch_models import RECORD
from launch.weights.hf_folder import INDEX
from recipes.compose.recipe import compose_recipe
from tests.launch.checks import GLM, overrides
from tests.launch.support import limi, recipe_of

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
    fields, fix = CONFIGS[name]
    words = [*GLM, f"model.checkpoint={base}"]
    assert not checkpoint_checks.model(compose_recipe(words)).failed
    changed(base, fields)
    row = checkpoint_checks.model(compose_recipe(words))
    assert row.failed and f"write {fix}" in row.fix
    assert not checkpoint_checks.model(compose_recipe([*words, *overrides(row.fix)])).failed


def test_every_difference_is_in_the_one_row(base):
    changed(base, {name: value for fields, _ in CONFIGS.values() for name, value in fields.items()})
    row = checkpoint_checks.model(compose_recipe([*GLM, f"model.checkpoint={base}"]))
    assert len(row.figure.splitlines()) == len(CONFIGS)
    assert all(fix in row.fix for _, fix in CONFIGS.values())


def test_a_field_that_a_checkpoint_lacks_is_refused(base):
    changed(base, {"use_qk_norm": None})
    row = checkpoint_checks.model(compose_recipe([*GLM, f"model.checkpoint={base}"]))
    assert "use_qk_norm is missing" in row.figure and "model.checkpoint=FOLDER of a glm4.5-tiny" in row.fix


@pytest.mark.parametrize("name", CONFIGS)
def test_the_release_of_glm_is_told_from_one_with_a_field_changed(reference, tmp_path, name):
    folder = Path(shutil.copytree(reference / "hf_configs" / "glm4.5", tmp_path / "glm"))
    recipe = compose_recipe(["model=glm4.5", f"model.checkpoint={folder}"])
    assert not checkpoint_checks.model(recipe).failed
    fields = CONFIGS[name][0]
    changed(folder, {n: v and v + 1 for n, v in fields.items()} if name != "QK-norm" else fields)
    assert checkpoint_checks.model(recipe).failed


def test_a_checkpoint_with_code_is_refused(base):
    assert not checkpoint_checks.code(base).failed
    (base / "deep").mkdir()
    (base / "deep" / "modeling.py").touch()
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(settings | {"auto_map": {"AutoModel": "modeling.Model"}}))
    row = checkpoint_checks.code(base)
    assert row.figure == "deep/modeling.py, auto_map in config.json, auto_map in tokenizer_config.json"
    assert f"remove deep/modeling.py from {base}" in row.fix
    assert f"take auto_map out of {base / 'config.json'}" in row.fix


def weights(base):
    """The row, and whether the tensors can be looked at."""
    known = checkpoint_checks.Known()
    row = checkpoint_checks.weights(base, known)
    assert (known.shards is None) == row.failed
    return row


def test_weights_that_are_not_whole_are_refused(base):
    assert not weights(base).failed
    mtp, main = base / "mtp-3.safetensors", base / "model.safetensors"
    whole = main.read_bytes()
    main.write_bytes(whole[:-1])
    row = weights(base)
    assert f"has {len(whole) - 1:,} bytes, and " in row.figure and row.fix.startswith(f"download {base} again")
    main.write_text("version https://git-lfs.github.com/spec/v1")
    assert "its header alone" in weights(base).figure
    main.write_bytes(mtp.read_bytes())
    assert "not in model.safetensors, where the index has them" in weights(base).figure
    main.write_bytes(whole)
    mtp.unlink()
    row = weights(base)
    assert row.figure == "mtp-3.safetensors is missing" and "download" in row.fix
    (base / INDEX).unlink()
    assert not weights(base).failed, "one file needs no index"
    main.rename(base / "other.safetensors")
    assert f"{INDEX} cannot be read: " in weights(base).figure
    (base / "other.safetensors").unlink()
    assert weights(base).figure == "no *.safetensors"


def test_files_beside_the_index_are_to_be_taken_out(base):
    (base / RECORD).unlink()
    shutil.copyfile(base / "mtp-3.safetensors", base / "model-00001-of-00004.safetensors")
    row = weights(base)
    assert row.figure.endswith(" more are in two shards, model-00001-of-00004.safetensors and mtp-3.safetensors")
    assert row.fix == f"move model-00001-of-00004.safetensors out of {base}"
    (base / RECORD).write_text("{}")  # of a fetch
    assert weights(base).fix == (
        f"copy {base} without model-00001-of-00004.safetensors, and write model.checkpoint=FOLDER of the copy"
    )
    (base / "model-00001-of-00004.safetensors").unlink()
    assert not weights(base).failed


def test_shards_of_two_downloads_are_told(base):
    (base / RECORD).unlink()
    index = json.loads((base / INDEX).read_text())
    names = {
        "mtp-3.safetensors": "model-00001-of-00002.safetensors",
        "model.safetensors": "model-00002-of-00002.safetensors",
    }
    for old, new in names.items():
        (base / old).rename(base / new)
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    assert not weights(base).failed
    shutil.copyfile(base / "model-00001-of-00002.safetensors", base / "model-00003-of-00004.safetensors")
    row = weights(base)
    assert row.figure.startswith("shards of 2 downloads, of 00002 and of 00004 files; ")
    assert row.fix == f"move model-00003-of-00004.safetensors out of {base}"
    (base / "model-00001-of-00002.safetensors").unlink()
    row = weights(base)
    assert "model-00001-of-00002.safetensors is missing" in row.figure and row.fix.startswith(f"download {base} again")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model-00001-of-00002.bin", "pickles, which are code: re-save them with transformers"),
        ("consolidated.00.pth", "pickles"),
        ("Qwen3-4B-Q4_K_M.gguf", "quantised for llama.cpp, which cannot be trained"),
        ("adapter_config.json", "a LoRA adapter, to be merged into its base first (peft: merge_and_unload"),
    ],
)
def test_a_folder_of_something_else_is_named_with_and_without_a_config(base, file, says):
    for path in base.glob("*.safetensors*"):
        path.unlink()
    (base / file).touch()
    assert weights(base).figure.startswith(f"no *.safetensors, but {file}: {says}")
    (base / "config.json").unlink()
    row = checkpoint_checks.model(compose_recipe([*GLM, f"model.checkpoint={base}"]))
    assert row.failed and row.figure.startswith(f"no config.json in '{base}', but {file}: {says}")


def test_the_rows_of_a_good_checkpoint_are_green_and_of_none_not_known(bases):
    for name, folder in bases.items():
        rows = checkpoint_checks.checkpoint_rows(compose_recipe([f"model={name}", f"model.checkpoint={folder}"]))
        assert [(row.name, row.failed, row.warned) for row in rows] == [
            (name, False, False) for name in ("model", "weights", "tensors")
        ]
    assert {row.figure for row in checkpoint_checks.checkpoint_rows(None)} == {"not known until what failed passes"}


def test_tensors_of_another_model_are_mended_as_its_config_is(base):
    """Where `config.json` is of another model too, the overrides that take its values come first."""
    config = json.loads((base / "config.json").read_text()) | {"intermediate_size": 128}
    (base / "config.json").write_text(json.dumps(config))
    words = [*GLM, f"model.checkpoint={base}"]
    model, _, tensors = checkpoint_checks.checkpoint_rows(compose_recipe(words))
    assert model.failed and not tensors.failed, "the tensors are the recipe's"
    model, _, tensors = checkpoint_checks.checkpoint_rows(compose_recipe([*words, "model.ffn=64"]))
    assert tensors.fix == model.fix and "write model.ffn=128, or" in model.fix
    assert tensors.figure.startswith(
        "3 tensors of another shape: model.layers.0.mlp.gate_proj.weight is [192, 96], not [64, 96]"
    )


@pytest.mark.run
@pytest.mark.parametrize("stage", ["train", "check"])
def test_a_tensor_that_is_missing_ends_it_before_a_rank_starts(root, base, stage):
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).unlink()
    (base / "mtp-3.safetensors").unlink()
    assert index["weight_map"]["lm_head.weight"] == "model.safetensors"
    with safe_open(base / "model.safetensors", "np") as file:
        held = {n: file.get_tensor(n) for n in file.keys() if n != "lm_head.weight"}  # noqa: SIM118
    save_file(held, base / "model.safetensors")
    done = limi(stage, "model=glm4.5-tiny", f"model.checkpoint={base}", f"cluster.root={root}", "run=lacking")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "\n  tensors: lm_head.weight is missing, but the recipe's model is untied" in done.stderr
    assert "write model.mtp=drop" in done.stderr and "Traceback" not in done.stderr
    assert not (root / "runs" / "lacking").exists()


def test_the_tokenizer_of_another_model_and_another_template_are_refused(root, bases, base):
    _, data, _ = recipe_of(root, *GLM)
    packed = {"training": data}
    recipe = compose_recipe([*GLM, f"model.checkpoint={base}"])
    assert not checkpoint_checks.tokenizer(recipe, packed).failed
    (base / "chat_template.jinja").write_text("{{ messages }}")
    row = checkpoint_checks.tokenizer(recipe, packed)
    assert row.figure == "training data has another chat_template.jinja" and "make data" in row.fix
    other = compose_recipe([f"model.checkpoint={bases['qwen3-tiny']}"])
    assert "another chat_template.jinja, tokenizer.json" in checkpoint_checks.tokenizer(other, packed).figure


@pytest.mark.run
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
    assert done.stderr.rstrip().endswith("write model.checkpoint=FOLDER of a qwen3-tiny"), "no override makes it one"


def test_a_mistyped_checkpoint_is_refused_and_not_made(tmp_path):
    done = limi("data", f"model.checkpoint={tmp_path}/typo", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert f"no tokenizer.json in '{tmp_path}/typo'; write model.checkpoint=FOLDER" in done.stderr
    assert not list(tmp_path.iterdir())
