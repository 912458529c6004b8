"""Layers that are computed again, and what they keep on the host, give the gradients of plain training bit for bit, in an order that
a GPU can run. In a process of its own: megatron.core is imported through the hook."""

import json

import pytest

from tests.launch.support import recipe_of
from tests.launch.test_gpt import run

ORDER = """
from launch.megatron import cpu
cpu.install()
import weakref
import pytest
import torch
from launch.model.host import BESIDE
from launch.model.recompute import Stays
from tests.launch.streams import Streams

LAYERS, KEPT = 3, 2  # tensors of a layer
stays_of = []

def forward(stays, streams, number):
    waiting, x = [], torch.full((4,), float(number))
    for layer in range(LAYERS):
        kept = [x, x * 2]
        out = x + 1  # the layer
        waiting.append((x.tolist(), stays.put(kept), weakref.ref(kept[1])))
        stays_of.append(waiting[-1][1])
        assert 0 < streams.under_way("out") <= BESIDE * KEPT, "leaves beside the next layer"
        del kept
        x = out
    return waiting

def backward(stays, streams, waiting):
    for layer in reversed(range(LAYERS)):
        wanted, stay, left = waiting.pop()
        tensors = stays.take(stay)
        assert [t.tolist() for t in tensors] == [wanted, [2 * n for n in wanted]]
        assert left() is None, "what left is not on the GPU any more"
        assert streams.under_way("back") == (KEPT if layer else 0), "the layer before comes beside this one"
        tensors[0] + tensors[1]  # the layer again
        assert stay.hosts == [] and stay.coming is None and stay.before is None, "the host's memory is free"

patch = pytest.MonkeyPatch()
with Streams().at_work(patch) as streams:
    stays = Stays(streams.lane())
    for number in range(2):
        backward(stays, streams, forward(stays, streams, number))
    first, second = (forward(stays, streams, number) for number in range(2))
    backward(stays, streams, first)
    third = forward(stays, streams, 2)
    backward(stays, streams, second)
    backward(stays, streams, third)
assert not streams.freed_early, streams.freed_early
for kind in ("out", "back"):
    assert sum(k == kind for k, _ in streams.copies) == 5 * LAYERS * KEPT, "each once"
assert all(stay.coming is None for stay in stays_of), "nothing is on its way that came before"
print("ok")
"""

STEP = """
import json
import sys
import torch
import torch.distributed as dist
from launch.megatron import cpu
cpu.install()
from megatron.core import parallel_state, tensor_parallel
from pathlib import Path
from unittest import mock
from launch.model import hf
from launch.model.attention import packed_of
from launch.model.gpt import build_chunks, transformer_config
from launch.model.recompute import RecomputedLayer
from launch.model.safetensors_folder import SafetensorsFolder
from recipes.compose import compose_recipe

dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
torch.manual_seed(0)
LENGTHS = [[60, 41], [100, 3, 30]]
batches = [torch.randint(0, 700, (2, 1, sum(n))) for n in LENGTHS]

def run(chunk, recipe, number):
    packed = packed_of(recipe.model, LENGTHS[number], torch.device("cpu"))
    tokens, labels = batches[number]
    return chunk(tokens, None, None, labels=labels, packed_seq_params=packed)

def step(words):
    recipe = compose_recipe(words)
    (chunk,) = build_chunks(recipe, transformer_config(recipe))
    hf.load([chunk], recipe.model, SafetensorsFolder(Path(recipe.model.checkpoint)).read)
    alone = run(chunk, recipe, 0)
    with mock.patch.object(RecomputedLayer, "run", side_effect=AssertionError("nothing is to be computed again")):
        with torch.no_grad():
            assert torch.equal(run(chunk, recipe, 0), alone), "without gradients"
        chunk.eval()
        assert torch.equal(run(chunk, recipe, 0), alone), "in evaluation"
        chunk.train()
    del alone
    for layer in chunk.decoder.layers:
        assert getattr(layer.self_attention.core_attention, "kept", None) is None
    both = [run(chunk, recipe, number) for number in (0, 1)]  # as in a pipeline
    for losses in both:
        losses.sum().backward()
    run(chunk, recipe, 1).sum().backward()
    return [x.detach() for x in both], {n: p.grad for n, p in chunk.named_parameters() if p.grad is not None}

words = json.loads(sys.argv[1])
losses, gradients = step(words)
for recompute in ("linear", "full"):
    for offload in ("false", "true"):
        mine, own = step([*words, f"layout.recompute={recompute}", f"layout.offload={offload}"])
        assert all(map(torch.equal, mine, losses)), (recompute, offload)
        assert own.keys() == gradients.keys() and len(own) > 10
        for name, gradient in gradients.items():
            assert torch.equal(own[name], gradient), (recompute, offload, name)
print("ok")
"""


def test_what_waits_on_the_host_comes_back_once_and_in_time():
    assert run(ORDER).strip().endswith("ok")


@pytest.mark.parametrize("model", ["qwen3-tiny", pytest.param("glm4.5-tiny", marks=pytest.mark.slow)])
def test_a_step_of_layers_computed_again_is_the_plain_one_bit_for_bit(root, model):
    words = [f"model={model}", "layout.ep=1", "cluster.gpus_per_node=1"]
    recipe, _, _ = recipe_of(root, *words)
    assert run(STEP, json.dumps([*words, f"model.checkpoint={recipe.model.checkpoint}"])).strip().endswith("ok")
