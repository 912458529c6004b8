"""Attention kernels over packed sequences: block-diagonal, causal, with grouped keys.

Which one runs on a GPU is `gpu.attention` of the recipe; `make bench-gpu smoke=true` measures them all. A CPU runs PyTorch's SDPA, one
sequence at a time.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from recipes.config import AttentionKernel
from recipes.errors import PreflightError


def attend(
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSeqParams,
    lengths: Sequence[int],
    scale: float,
) -> Tensor:
    """Attend over whole sequences: query [t, heads, d], key and value [t, kv_heads, d] -> [t, heads, d].

    lengths: tokens of each sequence; they sum to t.
    """
    if not query.is_cuda:
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([causal(q, k, v, scale) for q, k, v in parts])
    if kernel is AttentionKernel.cudnn and min(lengths) > 1:  # cuDNN takes no sequence of one token
        out: Tensor = _BySequence.apply(query, key, value, lengths, scale)
        return out
    return VARLEN_KERNELS[kernel](query, key, value, packed, scale)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend within one sequence by PyTorch's SDPA. mask: [queries, keys] bool in place of the causal one."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.squeeze(0).transpose(0, 1)


def varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """Run flash attention over packed sequences (PyTorch 2.11 or newer, bf16 or fp16, on a GPU).

    If a sequence has more keys than queries, the queries are the last of its tokens.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.size(1) != key.size(1) and _asks_for_gqa() else {}
    out: Tensor = varlen_attn(
        query, key, value, packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv, scale=scale,
        window_size=(-1, 0), **grouped
    )  # type: ignore[assignment]  # fmt: skip
    return out


@cache
def _asks_for_gqa() -> bool:
    """Return whether `varlen_attn` needs `enable_gqa`. torch 2.11 accepts fewer key heads than query heads without it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash4(query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """Run FlashAttention-4 over packed sequences, as `varlen` does (package flash-attn-4, on Hopper or Blackwell).

    Raise `PreflightError` if the package is missing.
    """
    # PyTorch's `activate_flash_attention_impl("FA4")` does not fit: this version returns more than torch 2.11 and 2.14 unpack.
    try:
        from flash_attn.cute.interface import flash_attn_varlen_func
    except ImportError as error:
        raise PreflightError(
            f"gpu.attention=flash4: {error}", "write gpu.attention=cudnn, or install flash-attn-4 with its dependencies"
        ) from error

    out: Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_k=packed.cu_seqlens_kv, max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_k=packed.max_seqlen_kv, softmax_scale=scale, causal=True,
    )[0]  # fmt: skip
    return out


# The kernels that take sequences with more keys than queries.
VARLEN_KERNELS: dict[AttentionKernel, Callable[..., Tensor]] = {
    AttentionKernel.varlen: varlen,
    AttentionKernel.flash4: flash4,
    AttentionKernel.cudnn: varlen,
}


class _BySequence(torch.autograd.Function):
    """cuDNN's attention, one sequence after the other. It saves one output of all sequences, as `varlen` does.

    PyTorch's own autograd would save each sequence's output beside the concatenated one.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        outs, normalisers = [], []
        for part in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
            q, k, v = map(_as_batch, part)
            out, normaliser, *others = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, 0.0, True, False, scale=scale
            )
            outs.append(_as_tokens(out))
            normalisers.append(normaliser)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.seeds = others[4:6]  # of dropout, which is off
        whole = outs[0] if len(outs) == 1 else torch.cat(outs)
        ctx.save_for_backward(query, key, value, whole, *normalisers)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *normalisers = ctx.saved_tensors
        parts = zip(*(x.split(ctx.lengths) for x in (gradient.contiguous(), query, key, value, out)), strict=True)
        found = []
        for part, normaliser in zip(parts, normalisers, strict=True):
            g, q, k, v, o = map(_as_batch, part)
            length = q.size(2)
            of_part = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                g, q, k, v, o, normaliser, *ctx.seeds, None, None, None, length, length, 0.0, True, scale=ctx.scale
            )
            found.append([_as_tokens(x) for x in of_part])
        of_query, of_key, of_value = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*found, strict=True))
        return of_query, of_key, of_value, None, None


def _as_batch(x: Tensor) -> Tensor:
    """[tokens, heads, d] -> [1, heads, tokens, d], without a copy."""
    return x.transpose(0, 1).unsqueeze(0)


def _as_tokens(x: Tensor) -> Tensor:
    """[1, heads, tokens, d] -> [tokens, heads, d], without a copy."""
    return x.squeeze(0).transpose(0, 1)
