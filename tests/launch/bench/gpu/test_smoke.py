"""The smoke step with its stand-ins for a GPU: every check passes, and a fault makes the right one fail."""

import json
import subprocess
import sys

import pytest
import torch

from recipes.errors import PreflightError
from recipes.paths import REPO
from tests.launch.support import called

NOT_CAUSAL = """
import sys, torch
from launch import limi
from launch.megatron import cpu
cpu.install()
from launch.model import attention_kernels
real = attention_kernels.causal
def everything(q, k, v, scale, mask=None):
    return real(q, k, v, scale, torch.ones(len(q), len(k), dtype=torch.bool))
attention_kernels.causal = everything
sys.exit(limi.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_every_check_passes_with_its_stand_in(tmp_path):
    done = called("bench-gpu", "smoke=true", f"cluster.root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "bench-gpu" / "smoke.json").read_text())
    assert "no figure below is a GPU's" in done.stdout and "FAIL" not in done.stdout
    passed = done.stdout.count("PASS  ")
    assert f"{passed} passed, 0 failed" in done.stdout and passed >= 18
    assert [check for check in record["checks"] if "best" in check["numbers"]]


@pytest.mark.slow
def test_attention_that_is_not_causal_shows_in_kernels_and_in_the_gradients_beside_fp32(tmp_path):
    """Gradients, tensor by tensor: the loss alone would hide it."""
    command = [sys.executable, "-c", NOT_CAUSAL, "bench-gpu", "smoke=true", f"cluster.root={tmp_path}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line.split(": ")[0] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "FAIL  attention by varlen" in failed and "FAIL  gradients beside fp32 on the CPU" in failed, failed


AGAIN = """
import weakref
from launch.megatron import cpu
cpu.install()
import torch
from launch.bench.gpu.smoke.outcome import Bench
from launch.bench.gpu.smoke.rank_checks import LAYOUTS, planned, rank_of
from recipes.compose.recipe import compose_recipe
one = planned(Bench(torch.device("cpu")), compose_recipe([]), LAYOUTS["all offloaded"])
with rank_of(one) as rank:
    first = weakref.ref(rank)
    rank.train_step(0)
del rank
with rank_of(one) as rank:
    assert first() is None
"""


@pytest.mark.slow
def test_a_rank_that_is_built_again_has_the_memory_of_the_earlier_one():
    done = subprocess.run([sys.executable, "-c", AGAIN], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_check_that_raises_is_a_failure_and_a_kernel_that_is_not_installed_is_none(megatron, monkeypatch):
    from launch.bench.gpu.smoke import kernel_checks
    from launch.bench.gpu.smoke.outcome import Bench, Outcome
    from launch.bench.gpu.smoke.smoke import _timed

    def raises():
        yield Outcome("first", "1", True)
        raise RuntimeError("no such kernel\nmore")

    found = [one for one, _ in _timed("a check", raises)]
    assert [(one.name, one.figure, one.passed) for one in found] == [
        ("first", "1", True), ("a check", "RuntimeError: no such kernel", False)
    ]  # fmt: skip

    def lacks(*_):
        raise PreflightError("No module named flash_attn", "install it")

    monkeypatch.setattr(kernel_checks, "kernels", lambda _: {"flash4": lacks})
    first, *_ = kernel_checks.check_kernels(Bench(torch.device("cpu")))
    assert first.passed is None and "not here" in first.figure


def test_a_copy_that_does_not_wait_is_seen_in_the_numbers(megatron):
    """NaN is never a small error."""
    from launch.bench.gpu.smoke.outcome import relative
    from launch.bench.gpu.smoke.rank_checks import _compared

    good, bad = {"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.ones(3), "b": torch.tensor([1.0, torch.nan])}
    assert _compared("x", good, good, 1e-3).passed and not _compared("x", bad, good, 1e-3).passed
    assert not relative(bad["b"], good["b"]) < 1e9
