"""What Megatron needs where Transformer Engine is missing. A GPU's ranks run without the hook that rewrites Megatron for a CPU."""

import subprocess
import sys

from recipes.paths import REPO

ROUTED = """
import torch
import launch.model.layers
from megatron.core.transformer.moe.moe_utils import router_gating_linear
tokens, weight = torch.ones(2, 1, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
router_gating_linear(tokens, weight, None, torch.float32).sum().backward()
print(weight.grad.sum().item())
"""


def test_a_router_runs_without_transformer_engine_and_without_the_hook_of_a_cpu():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ROUTED], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "24.0\n", done.stderr
