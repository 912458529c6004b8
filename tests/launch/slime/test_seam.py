"""The layers that slime builds, fed what slime feeds them, train as the embedded engine does; and the faults that once broke the
seam are each caught. Neither needs a checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.bench import parity
from recipes.paths import REPO
from tests.launch.slime import seam
from tests.launch.slime.support import on_cpu
from tests.launch.support import POOL

ONE = {
    f"{model[0]} on one rank": [*model, *parity.COMMON, "cluster.gpus_per_node=1"]
    for model in (parity.QWEN, parity.GLM)
}
TWO = ["Qwen3 TP2", "Qwen3 TP2 SP", "Qwen3 PP2 VPP2", "Qwen3 CP2", "GLM CP2 EP2", "GLM TP2 SP EP2"]
CASES = ONE | {name: parity.words_of(name) for name in TWO}


@pytest.fixture(scope="module")
def trained(root, on_one_rank):
    """By case, five steps on ranks as slime has them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.megatron.ranks.Worker", seam.Seam)
        found = {name: parity.train_layout(POOL, root, [*words, parity.EPS]) for name, words in CASES.items()}
        POOL.close()
    return found


@pytest.mark.run
@pytest.mark.parametrize("name", CASES)
def test_slimes_layers_on_slimes_batches_train_as_the_embedded_engine_does(trained, on_one_rank, name):
    run, own = trained[name], on_one_rank[CASES[name][0]]
    found = parity.difference(run, run, own, own)
    assert found.within(parity.FP32), found


@pytest.mark.run
def test_an_old_fault_put_back_is_caught(root):
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.slime.seam_faults", str(root)], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["none"] < 1e-5
    assert "takes 1 positional argument but 2 were given" in found["missing argument"]
    assert "has no attribute 'lengths'" in found["missing field"]
    assert "queries and keys are rotated twice" in found["rotated twice"]
    assert "queries and keys are not rotated" in found["rotated by nobody"]
    assert found["unrotated keys"] > 1e-3


@pytest.mark.contract
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_the_batches_are_slimes_own(tp, cp):
    on_cpu()
    lengths = [130, 1, 255, 64]
    rows = [torch.arange(1, n + 1) for n in lengths]
    done = subprocess.run(
        [os.environ["SLIME_PYTHON"], str(Path(__file__).with_name("real_batch.py")), json.dumps([lengths, tp, cp])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{os.environ['MEGATRON_ROOT']}:{os.environ['SLIME_ROOT']}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for rank in range(cp):
        tokens, fields = seam.packed(rows, tp, cp, rank)
        said = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
        assert theirs[rank] == {"tokens": tokens.tolist(), **said}
