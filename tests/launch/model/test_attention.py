"""On a GPU packed attention is PyTorch's varlen flash attention: what it is asked for; and, by kernels of plain arithmetic in its
place, that the result is that of SDPA, and what recomputation keeps of it."""

import inspect

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes.compose.recipe import compose_recipe
from recipes.config import AttentionKernel
from tests.launch.kernels import CALLS
from tests.launch.one_rank import gradients_of, model_of
from tests.launch.support import recipe_of

CPU = torch.device("cpu")


@pytest.fixture
def recipe():
    return compose_recipe(["model=qwen3-tiny", "cluster.gpus_per_node=1"])


@pytest.fixture
def core(megatron, recipe):
    """A layer's core attention."""
    from launch.model.attention import PackedAttention
    from launch.model.gpt import transformer_config

    return PackedAttention(transformer_config(recipe), kernel=AttentionKernel.varlen, softmax_scale=0.3)


@pytest.fixture
def by_varlen(core, monkeypatch):
    """On this CPU what a GPU would run; no kernel was called yet."""
    from launch.model.attention import PackedAttention
    from launch.model.attention_kernels import varlen

    monkeypatch.setattr(PackedAttention, "_kernel", lambda self, packed, q, k, v: varlen(q, k, v, packed, self.scale))
    CALLS.update(forward=0, backward=0)


def test_a_gpu_is_asked_for_varlen_attention_and_a_cpu_is_not(core, recipe, monkeypatch):
    from launch.model import attention, attention_kernels

    real, asked = torch_varlen.varlen_attn, []

    def newest(*arguments, **others):
        asked.append((arguments, others))
        return real(*arguments, **others)

    newest.__signature__ = inspect.signature(real)

    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        asked.append(
            ((query, key, value, cu_seq_q, cu_seq_k, max_q, max_k), {"scale": scale, "window_size": window_size})
        )
        return torch.empty_like(query)

    def call(function, device, heads, lengths):
        attention_kernels._asks_for_gqa.cache_clear()
        asked.clear()
        monkeypatch.setattr(torch_varlen, "varlen_attn", function)
        with FakeTensorMode(), torch.no_grad():
            packed = attention.packed_of(recipe.model, lengths, CPU)
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
    attention_kernels._asks_for_gqa.cache_clear()
    assert attention.packed_of(recipe.model, [3, 5, 2], CPU).cu_seqlens_q.tolist() == [0, 3, 8, 10]


LENGTHS = [9, 1, 30, 24]


def test_varlen_attention_is_that_of_each_sequence(core, recipe):
    from launch.model.attention import packed_of
    from launch.model.attention_kernels import varlen

    CALLS.update(forward=0, backward=0)
    torch.manual_seed(0)
    packed = packed_of(recipe.model, LENGTHS, CPU)
    for heads in ((4, 2, 2), (6, 1, 1), (4, 4, 4)):
        inputs = [torch.randn(sum(LENGTHS), n, 16, requires_grad=True) for n in heads]
        gradient = torch.randn(sum(LENGTHS), heads[0], 16)
        mine, theirs = varlen(*inputs, packed, core.scale), core._kernel(packed, *inputs)
        assert (mine - theirs).abs().max() < 2e-6
        for a, b in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (mine, theirs)), strict=True):
            assert (a - b).abs().max() < 2e-5 * b.abs().max(), heads
    assert CALLS == {"forward": 3, "backward": 3}


def test_cudnn_attention_takes_one_sequence_after_the_other(core, recipe):
    """Its own autograd keeps one output for all of them, which recomputation keeps too."""
    from launch.model.attention import packed_of
    from launch.model.attention_kernels import _BySequence
    from launch.model.attention_reuse import CachedCall

    torch.manual_seed(0)
    packed = packed_of(recipe.model, LENGTHS, CPU)
    for lengths in (LENGTHS, [sum(LENGTHS)]):
        packed = packed_of(recipe.model, lengths, CPU)
        CALLS.update(forward=0, backward=0)
        inputs = [torch.randn(sum(lengths), n, 16, requires_grad=True) for n in (4, 2, 2)]
        gradient = torch.randn(sum(lengths), 4, 16)
        mine, theirs = _BySequence.apply(*inputs, lengths, core.scale), core._kernel(packed, *inputs)
        assert (mine - theirs).abs().max() < 2e-6
        expected = torch.autograd.grad(theirs, inputs, gradient)
        found = torch.autograd.grad(mine, inputs, gradient)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 2e-5 * b.abs().max()
        assert {"forward": len(lengths), "backward": len(lengths)} == CALLS
        cached, twice = CachedCall(), []
        for _ in range(2):
            twice.append(cached.run(lambda *x, n=lengths: _BySequence.apply(*x, n, core.scale), *inputs))
            kept = [tuple(t.shape) for t in cached.tensors]
            assert kept == [(64, 4, 16), *((1, 4, n, 1) for n in lengths)], kept
        assert torch.equal(*twice) and torch.equal(twice[0], mine)
        assert all(map(torch.equal, torch.autograd.grad(twice[1], inputs, gradient), found))


def test_context_parallel_chunks_are_sequences_of_their_own(recipe):
    """Chunks by varlen attention, whose queries are the last of their keys, beside the whole sequences."""
    from launch.model.attention import keys_of_chunks, packed_of, zigzag_positions
    from launch.model.attention_kernels import causal, varlen

    torch.manual_seed(0)
    ranks, lengths = 3, [12, 30, 6]
    q, k, v = (torch.randn(sum(lengths), n, 16, requires_grad=True) for n in (4, 2, 2))
    whole = torch.cat([causal(*one, 0.3) for one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])
    starts = [0, 12, 42]
    own = [
        torch.cat([start + zigzag_positions(n, ranks, rank) for start, n in zip(starts, lengths, strict=True)])
        for rank in range(ranks)
    ]
    parts = []
    for rank, places in enumerate(own):
        packed = packed_of(recipe.model, lengths, CPU, ranks, rank)
        gathered = (torch.stack([x[p] for p in own]) for x in (k, v))
        keys, values = (keys_of_chunks(x, [n // ranks for n in lengths], rank) for x in gathered)
        parts.append(varlen(q[places], keys, values, packed.chunks, 0.3))
        assert (parts[-1] - whole[places]).abs().max() < 2e-6
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, (q, k, v), gradient)
    found = torch.autograd.grad(torch.cat(parts), (q, k, v), gradient[torch.cat(own)])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


def test_of_varlen_attention_its_result_alone_is_kept(core, recipe, by_varlen):
    """Inputs apart."""
    from launch.model.attention import packed_of
    from launch.model.attention_reuse import CachedCall

    core.cached = CachedCall()
    d = recipe.model.head_dim
    q, k, v = (torch.randn(sum(LENGTHS), n, d) for n in (4, 2, 2))
    with torch.no_grad():
        out = core(q, k, v, None, packed_seq_params=packed_of(recipe.model, LENGTHS, CPU))
    kept = {(tuple(t.shape), t.dtype) for t in core.cached.tensors}
    assert len(core.cached.tensors) == 4 and kept == {
        ((64, 4, d), torch.float32), ((4, 64), torch.float32), ((5,), torch.int32), ((2,), torch.uint64)
    }, kept  # fmt: skip
    assert any(t.data_ptr() == out.data_ptr() for t in core.cached.tensors), "the result is there once"


def test_linear_recomputation_runs_the_kernel_once_a_micro_batch(root, by_varlen):
    from launch.model.attention import packed_of

    recipe, _, _ = recipe_of(root, "model=qwen3-tiny")
    words = ["model=qwen3-tiny", f"model.checkpoint={recipe.model.checkpoint}", "cluster.gpus_per_node=1"]
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 700, (2, 1, 100))

    def step(words):
        """How often a layer's kernel ran forward in a micro-batch, and the gradients of two."""
        CALLS.update(forward=0, backward=0)
        recipe, chunk = model_of(words)
        packed = packed_of(recipe.model, [60, 40], CPU)
        for _ in range(2):
            chunk(tokens, None, None, labels=labels, packed_seq_params=packed).sum().backward()
        assert CALLS["backward"] == 2 * recipe.model.layers
        return CALLS["forward"] / recipe.model.layers / 2, gradients_of(chunk)

    times, gradients = step(words)
    assert times == 1
    for recompute, wanted in (
        ("linear", 1),
        ("full", 2),
        ("linear layout.offload=true", 1),
        ("full layout.offload=true", 2),
    ):
        times, found = step([*words, *f"layout.recompute={recompute}".split()])
        assert times == wanted, (recompute, times)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), (recompute, name)
