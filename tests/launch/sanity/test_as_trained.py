"""The export beside the trainer's checkpoint: whatever wrote either, one bit in another place is found and named."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.checks import Outcome
from launch.export import export
from launch.sanity.files import as_trained, trained_worker, trainers
from launch.sanity.subject import of_run
from launch.sanity.tensors import compare_worker, tensor_values
from launch.sanity.tensors.digests import Sums
from launch.weights import hf_names, shards
from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.families.common.parts import OUTPUT, Join
from tests.conftest import REPO
from tests.launch.export.test_export import LAYOUTS, MORE, trained
from tests.launch.recorded import cut, dense, flip, hollow_base, rewritten
from tests.launch.sanity import broken
from tests.launch.support import short_run

QUIET = Console(quiet=True)


def checked(recipe, folder, checkpoint):
    """The check, of an export as it lies on the disk."""
    found = shards.read_shards(folder)
    base = SafetensorsFolder(broken.Path(recipe.model.checkpoint))
    seen = tensor_values.compare(found, base, recipe.model, tensor_values.reach(recipe.optim, None), True, QUIET)
    own = {n: s for n, s in seen.items() if not (recipe.model.tied and n == OUTPUT)}
    return as_trained.as_trained(
        own, as_trained.read_trained(checkpoint, found, recipe.model, QUIET), checkpoint, recipe.model
    )


@pytest.fixture(scope="module")
def glm(root):
    """A run of the mixture of experts, its recipe and folder."""
    return trained(root, "as trained", LAYOUTS["GLM TP2 SP EP2"])


@pytest.mark.run
@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_the_ranks_export_is_the_checkpoint_s_in_every_layout(root, name, monkeypatch):
    recipe, run = trained(root, name, (LAYOUTS | MORE)[name])
    monkeypatch.setattr(compare_worker, "BLOCK", 1000)
    monkeypatch.setattr(as_trained, "BATCH_BYTES", 200_000)
    check = checked(recipe, run.hf, run.checkpoint(2))
    assert check.outcome is Outcome.passed, check
    frozen = sum("expert_bias" in link for link in hf_names.links(recipe.model))
    count = sum(len(link.hf) for link in hf_names.links(recipe.model).values()) - recipe.model.tied - frozen
    assert check.figure == f"{count} of {count} tensors, bit for bit"


@pytest.mark.run
def test_a_mistake_of_the_export_s_own_mapping_is_found(glm, tmp_path, monkeypatch):
    """It is written by `hf.split`, and compared by another reading of the names."""
    recipe, run = glm

    def wrong(link, whole, m, split=hf_names.split):
        parts = split(link, whole, m)
        return parts[::-1] if link.join is Join.gate_up else parts

    monkeypatch.setattr(hf_names, "split", wrong)
    export.export_checkpoint(recipe, run.checkpoint(2), tmp_path / "hf", QUIET)
    check = checked(recipe, tmp_path / "hf", run.checkpoint(2))
    assert check.outcome is Outcome.failed and "(gate and up swapped)" in check.detail


@pytest.mark.run
def test_a_checkpoint_with_checksums_is_compared(glm, tmp_path):
    """As slime writes its records."""
    recipe, run = glm
    assert checked(recipe, run.hf, rewritten(run.checkpoint(2), tmp_path / "as-slime")).outcome is Outcome.passed


@pytest.mark.run
def test_an_export_in_bf16_is_compared_with_fp32_weights(glm, tmp_path):
    """What is rounded is the trainer's value rounded."""
    recipe, run = glm
    folder = shutil.copytree(run.hf, tmp_path / "hf")
    whole = broken.Folder(folder, folder, folder)
    whole.tensors(lambda held: held.update({n: t.bfloat16() for n, t in held.items()}))
    assert checked(recipe, folder, run.checkpoint(2)).outcome is Outcome.passed
    whole.tensors(broken.swap(broken.GATE, broken.UP))
    assert checked(recipe, folder, run.checkpoint(2)).outcome is Outcome.failed


@pytest.mark.run
def test_an_export_of_another_step_is_another(root, tmp_path):
    plan, run = short_run(root, 1, "model=qwen3-tiny", "run=as-trained", "cluster.gpus_per_node=1")
    before = shutil.copytree(run.hf, tmp_path / "hf")
    plan, run = short_run(root, 2, "model=qwen3-tiny", "run=as-trained", "cluster.gpus_per_node=1")
    check = checked(plan.recipe, before, run.checkpoint(2))
    assert check.outcome is Outcome.failed and "is not the checkpoint's" in check.detail
    assert checked(plan.recipe, run.hf, run.checkpoint(2)).outcome is Outcome.passed


@pytest.mark.run
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_no_fault_of_the_export_and_said(glm, tmp_path, damage):
    from launch.sanity.files import file_checks as files

    recipe, run = glm
    checkpoint = rewritten(run.checkpoint(2), tmp_path / "damaged")
    damage(checkpoint)
    done = files.file_checks(
        run.hf,
        broken.Path(recipe.model.checkpoint),
        recipe,
        None,
        checkpoint,
        console=QUIET,
        written=tmp_path / "moved",
    )
    found = next(c for c in done if c.name == broken.TRAINED)
    assert (found.outcome, found.figure) == (Outcome.warned, "not compared")
    assert str(checkpoint) in found.detail and "it is damaged; copy it anew" in found.detail


@pytest.mark.run
def test_the_checkpoint_of_an_export_is_that_of_its_step(root):
    plan, run = short_run(root, 2, "model=qwen3-tiny", "run=of-its-step", "cluster.gpus_per_node=1")
    (run.root / "metrics.jsonl").write_text("")
    last = plan.schedule.num_steps
    assert of_run(plan, run.root / "hf").checkpoint is None, f"there is none of step {last}"
    assert of_run(plan, run.root / "hf-step000002").checkpoint == run.checkpoint(2)
    run.checkpoint(2).rename(run.root / "checkpoints" / f"step_{last:06}")
    assert of_run(plan, run.root / "hf").checkpoint == run.root / "checkpoints" / f"step_{last:06}"


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def digest(tensor):
    sums = Sums(tuple(tensor.shape))
    sums.add(tensor, np.arange(len(tensor)))
    return sums.digest()


@given(shapes, st.integers(0, 2**31), st.data())
def test_a_digest_tells_any_other_element_and_any_other_order(shape, seed, data):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    one = digest(tensor)
    other = tensor.clone()
    at = data.draw(st.integers(0, tensor.numel() - 1))
    other.view(torch.int16).view(-1)[at] ^= 1 << data.draw(st.integers(0, 15))
    assert digest(other).rows != one.rows and digest(other).any_rows != one.any_rows
    order = data.draw(st.permutations(range(shape[0])))
    moved = tensor[list(order)]
    assert digest(moved).any_rows == one.any_rows
    assert (digest(moved).rows == one.rows) == bool(torch.equal(moved, tensor))
    assert digest(tensor.T.contiguous()).rows == one.columns


@given(shapes, st.integers(0, 2**31), st.data())
def test_a_tensor_may_come_in_boxes_in_any_order(shape, seed, data):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    row, column = data.draw(st.integers(0, shape[0])), data.draw(st.integers(0, shape[1]))
    sums = Sums(shape)
    for rows, columns in data.draw(st.permutations([(a, b) for a in (0, 1) for b in (0, 1)])):
        at = np.arange(row, shape[0]) if rows else np.arange(row)
        box = tensor[torch.from_numpy(at)]
        sums.add(box[:, column:] if columns else box[:, :column], at, column if columns else 0)
    assert sums.digest() == digest(tensor)


@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny", "qwen3-32b", "glm4.5"])
def test_both_readings_of_megatron_s_names_agree(model):
    """The export's, by which tensors are split, and this one, by which their rows are found."""
    m = compose_recipe([f"model={model}"]).model
    m = replace(m, hidden=2, layers=min(m.layers, m.dense_layers + 2), experts=min(m.experts, 3))
    rows = {Join.qkv: (m.heads + 2 * m.kv_heads) * m.head_dim, Join.gate_up: 2 * 6, Join.same: 6}
    for name, link in hf_names.links(m).items():
        if "expert_bias" in name or (m.tied and name == "output_layer.weight"):
            continue
        count = rows[link.join]
        expected = hf_names.split(link, torch.arange(count)[:, None], m)
        numbered = trainers.parameter(*_stacked(name))
        found = trainers.homes(numbered, count, m)
        assert [*found] == [*link.hf], name
        for part, taken in zip(expected, found.values(), strict=True):
            assert taken.tolist() == part[:, 0].tolist(), name


def _stacked(name):
    """Its key where a checkpoint holds all layers and all experts in one, and its place there."""
    words, lead = name.split("."), []
    if words[:2] == ["decoder", "layers"]:
        lead.append(int(words.pop(2)))
    if "experts" in words:
        kind, number = words[-1][:6], words[-1][6:]
        words[-1] = kind
        words.insert(words.index("experts"), "experts")
        lead.append(int(number))
    assert trainers.leading(".".join(words)) == len(lead)
    return ".".join(words), tuple(lead)


@pytest.mark.run
def test_a_worker_s_memory_is_that_of_a_few_blocks(tmp_path):
    shape = ["hidden=1024", "ffn=3072", "layers=2", "heads=16", "kv_heads=8", "head_dim=64", "vocab=60000"]
    recipe = compose_recipe([*(f"model.{word}" for word in shape), f"model.checkpoint={tmp_path}/base"])
    hollow_base(recipe.model)
    checkpoint = dense(recipe.model, tmp_path / "checkpoint")
    assert max(f.stat().st_size for f in checkpoint.iterdir()) > 150e6, "most of it one record"
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    words = [tmp_path / "config.yaml", tmp_path / "base", checkpoint]
    command = [sys.executable, "-m", "tests.launch.sanity.trained_alone", *map(str, words)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50e6, f"{int(done.stdout) / 1e6:.0f} MB more"


@pytest.mark.run
def test_a_checkpoint_that_lacks_rows_is_refused_by_name(glm, tmp_path):
    recipe, run = glm
    found = shards.read_shards(run.hf)
    whole = as_trained._parameters(as_trained.TorchDist(run.checkpoint(2)), found.entries, recipe.model)
    one = next(p for p in whole if "linear_fc1" in p.name and len(p.pieces) > 1)
    with pytest.raises(as_trained.CheckpointError, match="holds .* elements of model.layers"):
        trained_worker.look(run.checkpoint(2), recipe.model, [replace(one, pieces=one.pieces[:1])])
