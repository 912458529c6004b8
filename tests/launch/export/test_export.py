"""The export of a checkpoint: bit for bit what the ranks export, only weights read, and what is damaged refused by name."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_prep.files import write_text
from launch.export import export
from launch.weights import hf_folder
from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.errors import CheckpointError, PreflightError
from tests.conftest import REPO
from tests.launch.recorded import cut, dense, flip, hollow_base, overwrite, records, rewritten
from tests.launch.support import called, recipe_of, short_run

pytestmark = pytest.mark.run

QUIET = Console(quiet=True)
TP, EP = ["layout.tp=2", "layout.sp=true"], ["layout.ep=2"]
QWEN, GLM = ["model=qwen3-tiny"], ["model=glm4.5-tiny", "layout=data_parallel"]
LAYOUTS = {
    "GLM TP2 SP EP2": (GLM, 2, [*TP, *EP]),
}
MORE = {
    "Qwen3 TP2 SP": (QWEN, 2, TP),
    "Qwen3 PP2 VPP2": (QWEN, 2, ["layout.pp=2", "layout.vpp=2"]),
    "Qwen3 untied TP2 PP2": (QWEN, 4, ["model.tied=false", "layout.tp=2", "layout.pp=2"]),
    "GLM EP2 PP2": (GLM, 4, ["model.layers=4", *EP, "layout.pp=2"]),
    "GLM TP2 SP ETP2, MTP dropped": (GLM, 2, [*TP, "layout.etp=2", "model.mtp=drop"]),
}


def trained(root, name, of, steps=2):
    """A run's recipe and folder after a few steps, its checkpoint saved and `hf/` exported by its ranks."""
    model, ranks, layout = of
    slug = re.sub(r"\W+", "-", f"export {name}".lower())
    words = [*model, f"run={slug}", f"cluster.gpus_per_node={ranks}", f"model.checkpoint={root}/models/{slug}", *layout]
    plan, run = short_run(root, steps, *words)
    write_text(run.root / "config.yaml", to_yaml(plan.recipe))
    plan.write(run.root / "plan.json")
    return plan.recipe, run


@pytest.fixture(scope="module")
def glm(root):
    """A run of the mixture of experts."""
    return trained(root, "glm", (GLM, 2, EP))


def content(folder):
    """{tensor: dtype and bytes}."""
    there = SafetensorsFolder(folder)
    return {
        n: (t.dtype, t.contiguous().view(torch.uint8).numpy().tobytes())
        for n in there.files
        if (t := there.read(n)) is not None
    }


def same(one, other):
    """Whether two folders hold the same files and tensors, bit for bit; their files of tensors may be cut otherwise."""
    names = [{p.name for p in folder.iterdir() if p.suffix != ".safetensors"} for folder in (one, other)]
    config = [(folder / "config.json").read_text() for folder in (one, other)]
    return names[0] == names[1] and config[0] == config[1] and content(one) == content(other)


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_an_export_is_the_one_that_the_ranks_write(root, tmp_path, monkeypatch, name):
    """By several workers, into several files."""
    monkeypatch.setattr(export, "BATCH_BYTES", 400_000)
    monkeypatch.setattr(hf_folder, "FILE_BYTES", 700_000)
    recipe, run = trained(root, name, (LAYOUTS | MORE)[name])
    assert content(run.hf) != content(Path(recipe.model.checkpoint)), "trained"
    export.export_checkpoint(recipe, run.checkpoint(2), tmp_path / "hf", QUIET)
    assert same(tmp_path / "hf", run.hf)
    files = sorted(p.name for p in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [hf_folder.file_name(i, len(files)) for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads((run.hf / "model.safetensors.index.json").read_text())["metadata"]


def exported_alone(*words):
    command = [sys.executable, "-m", "tests.launch.export_alone", *map(str, words)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_an_export_reads_weights_alone_and_needs_no_megatron(glm, tmp_path):
    recipe, run = glm
    alone = rewritten(run.checkpoint(2), tmp_path / "alone")
    others = records(alone, weights=False)
    assert sum(size for *_, size in others) > sum(size for *_, size in records(alone, weights=True)), "the optimizer's"
    for path, offset, size in others:
        overwrite(path, offset, b"\0" * size)
    write_text(tmp_path / "config.yaml", to_yaml(recipe))
    done = exported_alone(tmp_path / "config.yaml", alone, tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert re.search(r"hf: .* GB in .* s, .* GB/s", done.stdout), done.stdout
    assert same(tmp_path / "hf", run.hf)


@pytest.mark.slow
def test_a_worker_s_memory_is_the_largest_tensor_s_and_not_the_model_s(tmp_path):
    shape = ["hidden=1024", "ffn=3072", "layers=14", "heads=16", "kv_heads=8", "head_dim=64", "vocab=4096"]
    recipe = compose_recipe(
        [*QWEN, *(f"model.{word}" for word in shape), f"model.checkpoint={tmp_path}/base", f"cluster.root={tmp_path}"]
    )
    hollow_base(recipe.model)
    checkpoint = dense(recipe.model, tmp_path / "iter_0000000")
    write_text(tmp_path / "config.yaml", to_yaml(recipe))
    # So many bytes are one process's work.
    done = exported_alone(tmp_path / "config.yaml", checkpoint, tmp_path / "hf", 1 << 40)
    assert done.returncode == 0, done.stderr
    size = sum(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors"))
    assert size > 350e6
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 100e6, f"{grown / 1e6:.0f} MB more for tensors of at most 13 MB"
    whole, base = (SafetensorsFolder(tmp_path / name).entries for name in ("hf", "base"))
    assert {n: (e.dtype, e.shape) for n, e in whole.items()} == {n: (e.dtype, e.shape) for n, e in base.items()}


DAMAGES = {
    "a bit": (flip, "not what was written"),
    "the end of a file": (cut, "its checkpoint's index names .* it is damaged"),
    "a file": (lambda c: (c / "__0_0.distcp").unlink(), "has 0 bytes"),
    "half the index": (
        lambda c: (c / ".metadata").write_bytes((c / ".metadata").read_bytes()[:5000]),
        "cannot be read",
    ),
    "the index": (lambda c: (c / ".metadata").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_an_earlier_export_stays(glm, tmp_path, name):
    recipe, run = glm
    spoil, says = DAMAGES[name]
    checkpoint = rewritten(run.checkpoint(2), tmp_path / "iter_0000001")
    shutil.copytree(run.hf, tmp_path / "hf")
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=says):
        export.export_checkpoint(recipe, checkpoint, tmp_path / "hf", QUIET)
    assert same(tmp_path / "hf", run.hf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "iter_0000001"]


def test_a_bit_of_a_checkpoint_whose_files_are_recorded_is_missed_too(glm, tmp_path):
    recipe, run = glm
    shutil.copytree(run.checkpoint(2), tmp_path / "step_000002")
    flip(tmp_path / "step_000002")
    with pytest.raises(CheckpointError, match="is damaged .*is not the file that was written"):
        export.export_checkpoint(recipe, tmp_path / "step_000002", tmp_path / "hf", QUIET)


def test_a_checkpoint_without_a_tensor_or_a_piece_of_one_is_refused(glm, tmp_path):
    recipe, run = glm
    changed = rewritten(run.checkpoint(2), tmp_path / "a", lambda key, t: None if "final_layernorm" in key else t)
    with pytest.raises(CheckpointError, match=r"lacks decoder\.final_layernorm\.weight"):
        export.export_checkpoint(recipe, changed, tmp_path / "hf", QUIET)
    seen = []

    def lose(key, tensor):
        seen.append(key)
        lost = key.endswith("decoder.layers.1.mlp.experts.experts.linear_fc1.weight") and seen.count(key) == 3
        return None if lost and not key.startswith("optimizer") else tensor

    with pytest.raises(CheckpointError, match=r"experts\.linear_fc1\.weight \[\d\] in part only"):
        export.export_checkpoint(recipe, rewritten(run.checkpoint(2), tmp_path / "b", lose), tmp_path / "hf", QUIET)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.ffn=256"], r"linear_fc1\.weight has the shape \[384, 96\] .* and the recipe's model \[512, 96\]"),
        (["model.layers=4"], r"lacks decoder\.layers\.3\."),
        (["model.layers=2"], r"holds decoder\.layers\.2\."),
        (["model.experts=2"], r"has the shape \[4, 192, 96\].* \[2, 192, 96\]|router"),
        (["model.vocab=800"], r"word_embeddings\.weight has the shape \[768, 96\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(glm, root, tmp_path, words, says):
    _, run = glm
    other, *_ = recipe_of(
        root, *GLM, "cluster.gpus_per_node=1", f"model.checkpoint={root}/models/other-{words[0][6:]}", *words
    )
    with pytest.raises(CheckpointError, match=says):
        export.export_checkpoint(other, run.checkpoint(2), tmp_path / "hf", QUIET)


def test_the_expert_bias_is_the_base_s_and_a_trained_one_may_be_off_by_rounding_alone(glm, tmp_path):
    recipe, run = glm

    def changed(by):
        return lambda key, t: by(t) if key.endswith("expert_bias") and not key.startswith("optimizer") else t

    rounded = rewritten(run.checkpoint(2), tmp_path / "a", changed(lambda t: t.bfloat16().float()))
    export.export_checkpoint(recipe, rounded, tmp_path / "hf", QUIET)
    assert same(tmp_path / "hf", run.hf)
    moved = rewritten(run.checkpoint(2), tmp_path / "b", changed(lambda t: t + 1e-3))
    with pytest.raises(
        CheckpointError, match=r"e_score_correction_bias is frozen .* differ from the base's by up to 1\.0e-03"
    ):
        export.export_checkpoint(recipe, moved, tmp_path / "hf2", QUIET)


def test_a_base_that_lost_a_tensor_is_refused(glm, tmp_path):
    recipe, run = glm
    base = tmp_path / "base"
    shutil.copytree(recipe.model.checkpoint, base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    other = compose_recipe([*GLM, "cluster.gpus_per_node=1", f"model.checkpoint={base}"])
    with pytest.raises(CheckpointError, match=r"differ in model\.norm\.weight"):
        export.export_checkpoint(other, run.checkpoint(2), tmp_path / "hf", QUIET)


def test_a_tied_base_with_an_output_layer_of_its_own_keeps_its_name(root, tmp_path):
    recipe, run = trained(root, "tied", (QWEN, 2, []), steps=1)
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(recipe.model.checkpoint, base)
    (base / "model.safetensors.index.json").unlink()
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    other = compose_recipe([*QWEN, "cluster.gpus_per_node=1", f"model.checkpoint={base}", f"cluster.root={tmp_path}"])
    export.export_checkpoint(other, run.checkpoint(1), tmp_path / "hf", QUIET)
    found, ranks = content(tmp_path / "hf"), content(run.hf)
    assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    assert found == ranks


def test_the_command_exports_the_newest_checkpoint_or_a_step_s(glm, root):
    recipe, run = glm
    shutil.rmtree(run.root / "hf-step000002", ignore_errors=True)
    where = [f"cluster.root={root}", f"run={recipe.run}"]
    done = called("export", *where)
    assert done.returncode == 0, done.stderr
    assert same(run.root / "hf-step000002", run.hf)
    again = called("export", *where, "step=2", "model.mtp=drop")
    assert again.returncode == 0, again.stderr
    assert len(content(run.root / "hf-step000002")) < len(content(run.hf)), "in place of the earlier one"
    absent = called("export", *where, "step=7")
    assert absent.returncode == 2
    assert "no checkpoint of step 7; it has checkpoints of step 2: write step=N" in absent.stderr


def test_one_export_at_a_time_clears_away_what_a_killed_one_left(glm, tmp_path):
    recipe, run = glm
    (tmp_path / ".hf.killed").mkdir()
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(PreflightError, match="another export writes into"):
        export.export_checkpoint(recipe, run.checkpoint(2), tmp_path / "hf", QUIET)
    assert [p.name for p in tmp_path.iterdir()] == [".hf.killed"]
    os.close(folder)
    export.export_checkpoint(recipe, run.checkpoint(2), tmp_path / "hf", QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
