"""PyTorch's varlen flash attention and cuDNN's attention by plain arithmetic on the CPU, called as often as `CALLS` says. Importing
this registers them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward

CALLS = {"forward": 0, "backward": 0}
LIBRARY = torch.library.Library("aten", "IMPL", "CPU")


def _segments(*pairs: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """pairs: boundaries, and what they divide."""
    return zip(*(x.split(boundaries.diff().tolist()) for boundaries, x in pairs), strict=True)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    weight = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.size(1) // k.size(1), 1)) * scale
    return weight.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q)), float("-inf"))


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, scale)
    out = torch.einsum("hqk,khd->qhd", s.softmax(-1), v.repeat_interleave(q.size(1) // k.size(1), 1))
    return out, s.logsumexp(-1)


def _one_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, normaliser: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """normaliser: [queries, heads]."""
    groups = (k.size(1), q.size(1) // k.size(1))
    weight = (_scores(q, k, scale) - normaliser.t()[..., None]).exp()
    of_v = torch.einsum("hqk,qhd->khd", weight, g)
    of_weight = torch.einsum("qhd,khd->hqk", g, v.repeat_interleave(groups[1], 1))
    of_scores = weight * (of_weight - (g * o).sum(-1).t()[..., None]) * scale
    of_q = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(groups[1], 1))
    of_k = torch.einsum("hqk,qhd->khd", of_scores, q)
    return of_q, *(x.unflatten(1, groups).sum(2) for x in (of_k, of_v))


@_varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, keys: Tensor, max_q: int, max_k: int, is_causal: bool,
    scale: float, window_size: list[int], *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    CALLS["forward"] += 1
    assert is_causal and window_size == [-1, 0] and others in ((), (True,))
    assert max_q == boundaries.diff().max() and max_k == keys.diff().max()
    outs, normalisers = [], []
    for q, k, v in _segments((boundaries, query.float()), (keys, key.float()), (keys, value.float())):
        out, normaliser = _one(q, k, v, scale)
        outs.append(out)
        normalisers.append(normaliser)
    return torch.cat(outs).to(query.dtype), torch.cat(normalisers, 1), torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def _backward(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, boundaries: Tensor, keys: Tensor,
    max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: float, window_size: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["backward"] += 1
    by_query = ((boundaries, x) for x in (of_out.float(), query.float(), out.float(), lse.t()))
    by_key = ((keys, x.float()) for x in (key, value))
    found = [_one_backward(g, q, k, v, o, n, scale) for g, q, o, n, k, v in _segments(*by_query, *by_key)]
    return tuple(torch.cat(x).to(query.dtype) for x in zip(*found, strict=True))


def _tokens(x: Tensor) -> Tensor:
    assert len(x) == 1
    return x[0].transpose(0, 1).float()


def _batch(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(0, 1)[None].to(like.dtype)


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, normalisers: bool, dropout: float, is_causal: bool, debug: bool = False,
    *, scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    CALLS["forward"] += 1
    assert bias is None and normalisers and not dropout and is_causal and not debug
    out, normaliser = _one(_tokens(query), _tokens(key), _tokens(value), scale)
    length, seed = query.size(2), torch.zeros((), dtype=torch.int64)
    return _batch(out, query), normaliser[None, ..., None], seed, seed, length, length, seed, seed, seed


def _cudnn_backward(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
    bias: Any, boundaries: Any, keys: Any, max_q: int, max_k: int, dropout: float, is_causal: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["backward"] += 1
    assert max_q == max_k == query.size(2) and not dropout and is_causal
    g, q, k, v, o = map(_tokens, (of_out, query, key, value, out))
    found = _one_backward(g, q, k, v, o, lse[0, ..., 0].t(), scale)
    return tuple(_batch(x, query) for x in found)


LIBRARY.impl("_scaled_dot_product_cudnn_attention", _cudnn)
LIBRARY.impl("_scaled_dot_product_cudnn_attention_backward", _cudnn_backward)
