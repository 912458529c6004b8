"""Cross entropy in chunks is the plain one, in value and every gradient, and holds no softmax. In a process of its own:
megatron.core is imported through the hook."""

import json

import pytest

from tests.launch.support import recipe_of
from tests.launch.test_gpt import run

STEP = """
import json
import sys
import torch
import torch.distributed as dist
from launch.megatron import cpu
cpu.install()
from megatron.core import parallel_state, tensor_parallel
from pathlib import Path
from launch.model import hf
from launch.model.attention import packed_of
from launch.model.gpt import build_chunks, transformer_config
from launch.model.safetensors_folder import SafetensorsFolder
from recipes.compose import compose_recipe

dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
torch.manual_seed(0)
tokens, labels = torch.randint(0, 700, (2, 1, 1000))
supervised = torch.rand(1, 1000)

def step(words):
    recipe = compose_recipe(words)
    (chunk,) = build_chunks(recipe, transformer_config(recipe))
    hf.load([chunk], recipe.model, SafetensorsFolder(Path(recipe.model.checkpoint)).read)
    packed = packed_of(recipe.model, [1000], torch.device("cpu"))
    largest = 0
    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = chunk(tokens, None, None, labels=labels, packed_seq_params=packed)
    (losses * supervised).sum().backward()
    return losses.detach(), {n: p.grad for n, p in chunk.named_parameters() if p.grad is not None}, largest

words, sizes = map(json.loads, sys.argv[1:])
losses, gradients, largest = step(words)
assert largest >= 4 * 1000 * 768, "the plain one holds the softmax"
for size in sizes:
    mine, own, held = step([*words, f"layout.loss_chunk={size}"])
    assert mine.shape == losses.shape == (1, 1000) and mine.dtype == losses.dtype == torch.float32
    print(size, float((mine - losses).abs().max()), max(float((own[n] - g).norm() / g.norm()) for n, g in gradients.items()))
    assert torch.allclose(mine, losses, rtol=0, atol=2e-6), size
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (size, name)
    assert held < 4 * 1000 * 768, (size, held)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["model=qwen3-tiny"],
        ["model=qwen3-tiny", "model.tied=false"],
        pytest.param(["model=glm4.5-tiny", "layout.ep=1"], marks=pytest.mark.slow),
    ],
)
def test_the_loss_in_chunks_is_the_plain_one_in_value_and_gradient(root, words):
    name = "-".join(words).translate(str.maketrans("=.", "--"))
    recipe, _, _ = recipe_of(root, *words, f"model.checkpoint={root}/models/loss-{name}")
    words = [*words, f"model.checkpoint={recipe.model.checkpoint}", "cluster.gpus_per_node=1"]
    assert run(STEP, json.dumps(words), json.dumps([1, 64, 999, 1000, 5000])).count("\n") == 5
