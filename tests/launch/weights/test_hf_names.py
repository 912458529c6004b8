"""The mapping to Hugging Face names, both ways, and the hook through which Megatron is imported."""

import os
import subprocess
import sys

import pytest
import torch

from recipes.checkpoint.tensors import is_mtp, links
from recipes.compose.recipe import compose_recipe
from recipes.families.common.parts import Join
from tests.conftest import REPO


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
def test_every_tensor_maps_both_ways(bases, name):
    from launch.weights import hf_names
    from launch.weights.safetensors_folder import SafetensorsFolder

    m = compose_recipe([f"model={name}"]).model
    base = SafetensorsFolder(bases[name])
    table = links(m)
    named = [n for link in table.values() for n in link.hf]
    own = {n for n in base.files if not is_mtp(n, m)}
    assert set(named) == own, set(named) ^ own
    assert len(named) == len(set(named)) + m.tied, "each tensor once, the tied embedding twice"
    for link in table.values():
        parts = [base.read(n) for n in link.hf]
        whole = hf_names.join(link, parts, m)
        for a, b in zip(hf_names.split(link, whole, m), parts, strict=True):
            assert torch.equal(a, b), link
        for axis in range(whole.dim()) if link.join is Join.same else (0,):
            if whole.shape[axis] % 4 == 0 and (link.join is not Join.qkv or m.kv_heads % 2 == 0):
                shards = [hf_names.shard(link, whole, axis, 2, r) for r in range(2)]
                assert torch.equal(hf_names.unshard(link, shards, axis), whole), link


def test_the_hook_leaves_torch_itself_as_it_is(megatron):
    found = torch.cuda.is_available(), torch.empty(1).type(), torch.cuda.current_device.__module__
    assert found == (False, "torch.FloatTensor", "torch.cuda")


def hook(what, **env):
    return subprocess.run(
        [sys.executable, "-m", "tests.launch.hook", what],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.run
def test_the_hook_refuses_a_megatron_imported_before_it():
    assert "imported before launch.megatron.cpu.install()" in hook("late").stderr


@pytest.mark.run
def test_a_flash_mla_that_wants_a_driver_is_left_alone(tmp_path):
    (tmp_path / "flash_mla.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    done = hook("flash_mla", PYTHONPATH=str(tmp_path))
    assert done.stdout == "False\n", done.stderr
