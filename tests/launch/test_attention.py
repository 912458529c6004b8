"""On a GPU packed attention is PyTorch's varlen flash attention: what it is asked for; and, by kernels of plain arithmetic in its
place, that the result is that of SDPA, and what recomputation keeps of it. In a process of its own: megatron.core is imported
through the hook."""

import json

from tests.launch.support import recipe_of
from tests.launch.test_gpt import run

SETUP = """
import json
import sys
import torch
import torch.distributed as dist
from launch.megatron import cpu
cpu.install()
from megatron.core import parallel_state, tensor_parallel
from launch.model import attention
from launch.model.attention import PackedAttention, packed_of, varlen
from launch.model.gpt import transformer_config
from recipes.compose import compose_recipe

dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
recipe = compose_recipe(["model=qwen3-tiny", "cluster.gpus_per_node=1"])
core = PackedAttention(transformer_config(recipe), softmax_scale=0.3)
"""

DISPATCH = (
    SETUP
    + """
from unittest import mock
from torch._subclasses.fake_tensor import FakeTensorMode
import torch.nn.attention.varlen as module

real, asked = module.varlen_attn, []

def newest(*arguments, **others):
    asked.append((arguments, others))
    return real(*arguments, **others)
newest.__signature__ = __import__("inspect").signature(real)

def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    asked.append(((query, key, value, cu_seq_q, cu_seq_k, max_q, max_k), {"scale": scale, "window_size": window_size}))
    return torch.empty_like(query)

def call(function, device, heads, lengths):
    attention._asks_for_gqa.cache_clear()
    asked.clear()
    with mock.patch.object(module, "varlen_attn", function), FakeTensorMode(), torch.no_grad():
        packed = packed_of(recipe.model, lengths, torch.device("cpu"))
        packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.empty_like(packed.cu_seqlens_q, device=device)
        q, k, v = (torch.empty(sum(lengths), n, 16, device=device) for n in heads)
        out = core._kernel(packed, q, k, v)
        assert out.shape == q.shape and out.device.type == device
        return packed, (q, k, v)

here = "enable_gqa" in newest.__signature__.parameters
for function, takes in ((newest, here), (of_2_11, False)):
    for heads in ((4, 2, 2), (4, 4, 4)):
        packed, inputs = call(function, "cuda", heads, [300, 2048, 7])
        ((arguments, others),) = asked
        assert all(a is b for a, b in zip(arguments[:3], inputs, strict=True)), "as they are, heads included"
        assert arguments[3] is arguments[4] is packed.cu_seqlens_q
        assert packed.cu_seqlens_q.dtype == torch.int32 and packed.cu_seqlens_q.shape == (4,)
        assert arguments[5:] == (2048, 2048)
        grouped = {"enable_gqa": True} if takes and heads[0] != heads[1] else {}
        assert others == {"scale": 0.3, "window_size": (-1, 0), **grouped}, others
call(newest, "cpu", (4, 2, 2), [30, 20])
assert not asked, "a CPU has no flash attention"
assert packed_of(recipe.model, [3, 5, 2], torch.device("cpu")).cu_seqlens_q.tolist() == [0, 3, 8, 10]
print("ok")
"""
)

# Flash attention by plain arithmetic, called as often as `calls` says.
KERNELS = """
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward
calls = {"forward": 0, "backward": 0}

def segments(boundaries, *tensors):
    return zip(*(x.split(boundaries.diff().tolist()) for x in tensors), strict=True)

def scores(q, k, scale):
    weight = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.size(1) // k.size(1), 1)) * scale
    return weight.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), float("-inf"))

@_varlen_attn.register_kernel("cpu")
def forward(query, key, value, boundaries, keys, max_q, max_k, is_causal, scale, window_size, *others):
    calls["forward"] += 1
    assert is_causal and window_size == [-1, 0] and others in ((), (True,))
    assert max_q == max_k == boundaries.diff().max() and torch.equal(boundaries, keys)
    outs, normalisers = [], []
    for q, k, v in segments(boundaries, *(x.float() for x in (query, key, value))):
        s = scores(q, k, scale)
        normalisers.append(s.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", s.softmax(-1), v.repeat_interleave(q.size(1) // k.size(1), 1)))
    return torch.cat(outs).to(query.dtype), torch.cat(normalisers, 1), torch.zeros(2, dtype=torch.uint64)

@_varlen_attn_backward.register_kernel("cpu")
def backward(of_out, query, key, value, out, lse, boundaries, keys, max_q, max_k, is_causal, rng, scale, window_size):
    calls["backward"] += 1
    found = []
    for g, q, k, v, o, n in segments(boundaries, *(x.float() for x in (of_out, query, key, value, out)), lse.t()):
        groups = (k.size(1), q.size(1) // k.size(1))
        weight = (scores(q, k, scale) - n.t()[..., None]).exp()
        of_v = torch.einsum("hqk,qhd->khd", weight, g)
        of_weight = torch.einsum("qhd,khd->hqk", g, v.repeat_interleave(groups[1], 1))
        of_scores = weight * (of_weight - (g * o).sum(-1).t()[..., None]) * scale
        of_q = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(groups[1], 1))
        of_k = torch.einsum("hqk,qhd->khd", of_scores, q)
        found.append((of_q, *(x.unflatten(1, groups).sum(2) for x in (of_k, of_v))))
    return tuple(torch.cat(x).to(query.dtype) for x in zip(*found, strict=True))
"""

NUMBERS = (
    SETUP
    + KERNELS
    + """
torch.manual_seed(0)
lengths = [9, 1, 30, 24]
packed = packed_of(recipe.model, lengths, torch.device("cpu"))
for heads in ((4, 2, 2), (6, 1, 1), (4, 4, 4)):
    inputs = [torch.randn(sum(lengths), n, 16, requires_grad=True) for n in heads]
    gradient = torch.randn(sum(lengths), heads[0], 16)
    mine, theirs = varlen(*inputs, packed, core.scale), core._kernel(packed, *inputs)
    assert (mine - theirs).abs().max() < 2e-6
    for a, b in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (mine, theirs)), strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max(), heads
assert calls == {"forward": 3, "backward": 3}

# What `Kept` keeps of the kernel, inputs apart.
from launch.model.kept import Kept
PackedAttention._kernel = lambda self, packed, q, k, v: varlen(q, k, v, packed, self.scale)
core.kept = Kept()
d = recipe.model.head_dim
q, k, v = (torch.randn(sum(lengths), n, d) for n in (4, 2, 2))
with torch.no_grad():
    out = core(q, k, v, None, packed_seq_params=packed)
kept = {(tuple(t.shape), t.dtype) for t in core.kept.tensors}
assert len(core.kept.tensors) == 4 and kept == {
    ((64, 4, d), torch.float32), ((4, 64), torch.float32), ((5,), torch.int32), ((2,), torch.uint64)
}, kept
assert any(t.data_ptr() == out.data_ptr() for t in core.kept.tensors), "the result is there once"
print("ok")
"""
)

STEPS = (
    SETUP
    + KERNELS
    + """
from pathlib import Path
from launch.model import hf
from launch.model.gpt import build_chunks
from launch.model.safetensors_folder import SafetensorsFolder
PackedAttention._kernel = lambda self, packed, q, k, v: varlen(q, k, v, packed, self.scale)
torch.manual_seed(0)
tokens, labels = torch.randint(0, 700, (2, 1, 100))

def step(words):
    calls.update(forward=0, backward=0)
    recipe = compose_recipe(words)
    (chunk,) = build_chunks(recipe, transformer_config(recipe))
    hf.load([chunk], recipe.model, SafetensorsFolder(Path(recipe.model.checkpoint)).read)
    packed = packed_of(recipe.model, [60, 40], torch.device("cpu"))
    for _ in range(2):
        chunk(tokens, None, None, labels=labels, packed_seq_params=packed).sum().backward()
    assert calls["backward"] == 2 * recipe.model.layers
    return calls["forward"] / recipe.model.layers / 2, {n: p.grad for n, p in chunk.named_parameters()}

words = json.loads(sys.argv[1])
times, gradients = step(words)
assert times == 1
for recompute, wanted in (("linear", 1), ("full", 2), ("linear layout.offload=true", 1), ("full layout.offload=true", 2)):
    times, found = step([*words, *f"layout.recompute={recompute}".split()])
    assert times == wanted, (recompute, times)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), (recompute, name)
print("ok")
"""
)


def test_a_gpu_is_asked_for_varlen_attention_and_a_cpu_is_not():
    assert run(DISPATCH).strip().endswith("ok")


def test_varlen_attention_is_that_of_each_sequence_and_keeps_its_result_alone():
    assert run(NUMBERS).strip().endswith("ok")


def test_linear_recomputation_runs_the_kernel_once_a_micro_batch(root):
    recipe, _, _ = recipe_of(root, "model=qwen3-tiny")
    words = ["model=qwen3-tiny", f"model.checkpoint={recipe.model.checkpoint}", "cluster.gpus_per_node=1"]
    assert run(STEPS, json.dumps(words)).strip().endswith("ok")
