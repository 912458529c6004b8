"""The mapping to Hugging Face names, both ways. In a process of its own: megatron.core is imported through the hook."""

import os
import subprocess
import sys

from tests.conftest import REPO

CODE = """
import torch
from launch.megatron import cpu
cpu.install()
from launch.model import hf
from recipes.families.parts import Join
from recipes.tensors import is_mtp, links
from recipes.compose import compose_recipe
from launch.model.safetensors_folder import SafetensorsFolder
from pathlib import Path
import sys

for name, folder in zip(("qwen3-tiny", "glm4.5-tiny"), sys.argv[1:], strict=True):
    m = compose_recipe([f"model={name}"]).model
    base = SafetensorsFolder(Path(folder))
    table = links(m)
    named = [n for link in table.values() for n in link.hf]
    own = {n for n in base.files if not is_mtp(n, m)}
    assert set(named) == own, set(named) ^ own
    assert len(named) == len(set(named)) + m.tied, "each tensor once, the tied embedding twice"
    for link in table.values():
        parts = [base.read(n) for n in link.hf]
        whole = hf.join(link, parts, m)
        for a, b in zip(hf.split(link, whole, m), parts, strict=True):
            assert torch.equal(a, b), link
        for axis in range(whole.dim()) if link.join is Join.same else (0,):
            if whole.shape[axis] % 4 == 0 and (link.join is not Join.qkv or m.kv_heads % 2 == 0):
                shards = [hf.shard(link, whole, axis, 2, r) for r in range(2)]
                assert torch.equal(hf.unshard(link, shards, axis), whole), link
before = torch.cuda.is_available(), torch.empty(1).type(), torch.cuda.current_device.__module__
assert before == (False, "torch.FloatTensor", "torch.cuda"), "torch itself is untouched"
print("ok")
"""


def test_every_tensor_maps_both_ways(bases):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, bases.values())], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("ok"), done.stderr


def test_the_hook_refuses_a_megatron_imported_before_it():
    code = "import megatron.core\nfrom launch.megatron import cpu\ncpu.install()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert "imported before launch.megatron.cpu.install()" in done.stderr


def test_a_flash_mla_that_wants_a_driver_is_left_alone(tmp_path):
    (tmp_path / "flash_mla.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    code = "from launch.megatron import cpu; cpu.install(); import megatron.core.transformer.attention as a; print(a.HAVE_FMLA)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, env=env)
    assert done.stdout == "False\n", done.stderr
