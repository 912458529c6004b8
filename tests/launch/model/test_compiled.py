"""What a GPU runs as one kernel: compiled here for the CPU, and left as it is where there is no GPU."""

import subprocess
import sys

import pytest
import torch

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
