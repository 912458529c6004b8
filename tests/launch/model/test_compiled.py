"""What a GPU runs as one kernel: compiled here for the CPU, and left as it is where there is no GPU."""

import subprocess
import sys

import pytest
import torch

from launch.model import compiled
from launch.model.compiled import fused
from tests.conftest import REPO


@pytest.mark.slow
def test_compiled_functions_are_the_plain_ones_at_every_length():
    """In a process of its own: the hook through which Megatron is imported compiles nothing."""
    done = subprocess.run([sys.executable, "-m", "tests.launch.compiled"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cpu_runs_the_function_as_it_is():
    calls = []

    @fused
    def double(x):
        """Twice as much."""
        calls.append(x)
        return 2 * x

    assert double.__doc__ == "Twice as much."
    x = torch.ones(3)
    assert torch.equal(double(x), 2 * x) and calls[0] is x


def test_a_gpu_compiles_without_gradients_and_for_many_widths(monkeypatch):
    """Else each combination of tensors that require gradients would be compiled anew, and after eight PyTorch would give up."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    seen = []

    def compile_(function):
        def run(*arguments):
            seen.append((torch.is_grad_enabled(), [x.requires_grad for x in arguments if isinstance(x, torch.Tensor)]))
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    scaled = fused(lambda x, weight, eps: x * weight + eps)
    x, weight = torch.ones(3, 2).as_subclass(OnGpu).requires_grad_(), torch.ones(2, requires_grad=True)
    out = scaled(x, weight, 1.0)
    with torch.no_grad():
        scaled(x.detach(), weight, 1.0)
    assert seen == [(False, [False, False])] * 2 and not out.requires_grad and out.tolist() == [[2.0, 2.0]] * 3
    assert torch._dynamo.config.recompile_limit >= compiled.MOST_VARIANTS >= 64
