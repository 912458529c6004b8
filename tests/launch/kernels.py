"""PyTorch's varlen flash attention by plain arithmetic on the CPU, called as often as `CALLS` says. Importing this registers it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward

CALLS = {"forward": 0, "backward": 0}


def _segments(boundaries: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(boundaries.diff().tolist()) for x in tensors), strict=True)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    weight = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.size(1) // k.size(1), 1)) * scale
    return weight.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), float("-inf"))


@_varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, keys: Tensor, max_q: int, max_k: int, is_causal: bool,
    scale: float, window_size: list[int], *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    CALLS["forward"] += 1
    assert is_causal and window_size == [-1, 0] and others in ((), (True,))
    assert max_q == max_k == boundaries.diff().max() and torch.equal(boundaries, keys)
    outs, normalisers = [], []
    for q, k, v in _segments(boundaries, *(x.float() for x in (query, key, value))):
        s = _scores(q, k, scale)
        normalisers.append(s.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", s.softmax(-1), v.repeat_interleave(q.size(1) // k.size(1), 1)))
    return torch.cat(outs).to(query.dtype), torch.cat(normalisers, 1), torch.zeros(2, dtype=torch.uint64)


@_varlen_attn_backward.register_kernel("cpu")
def _backward(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, boundaries: Tensor, keys: Tensor,
    max_q: int, max_k: int, is_causal: bool, rng: Tensor, scale: float, window_size: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    CALLS["backward"] += 1
    found = []
    for g, q, k, v, o, n in _segments(boundaries, *(x.float() for x in (of_out, query, key, value, out)), lse.t()):
        groups = (k.size(1), q.size(1) // k.size(1))
        weight = (_scores(q, k, scale) - n.t()[..., None]).exp()
        of_v = torch.einsum("hqk,qhd->khd", weight, g)
        of_weight = torch.einsum("qhd,khd->hqk", g, v.repeat_interleave(groups[1], 1))
        of_scores = weight * (of_weight - (g * o).sum(-1).t()[..., None]) * scale
        of_q = torch.einsum("hqk,khd->qhd", of_scores, k.repeat_interleave(groups[1], 1))
        of_k = torch.einsum("hqk,qhd->khd", of_scores, q)
        found.append((of_q, *(x.unflatten(1, groups).sum(2) for x in (of_k, of_v))))
    return tuple(torch.cat(x).to(query.dtype) for x in zip(*found, strict=True))
