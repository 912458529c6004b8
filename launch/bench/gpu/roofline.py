"""The least time a step can take on this device: its matrix products and its attention at the rates that these attain here, alone,
at these shapes; nothing else, and no waiting."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import device_here, dtype_of
from launch.bench.gpu.timing import timed
from launch.model.attention import attend, packed_of
from recipes.config import Recipe, Recompute

REPEATS = 3


def measure(planned: Planned) -> dict[str, Any]:
    """seconds: of a step's products and of attention, what the layout computes again counted; tflops: the rates, operations that
    count being those of the recomputed too."""
    r, device = planned.recipe, device_here()
    assert not r.model.experts, "of dense models"
    seconds = dict.fromkeys(("products", "attention", "attention backward"), 0.0)
    work = dict(seconds)
    for lengths in planned.batches:
        for name, (taken, operations) in _batch(r, tuple(lengths), device).items():
            seconds[name] += taken
            work[name] += operations
    return {"seconds": seconds, "tflops": {name: work[name] / seconds[name] / 1e12 for name in seconds}}


def _batch(r: Recipe, lengths: tuple[int, ...], device: torch.device) -> dict[str, tuple[float, float]]:
    """Seconds and operations of one micro-batch."""
    m, recompute = r.model, r.layout.recompute
    tokens, whole = sum(lengths), recompute in (Recompute.linear, Recompute.full)
    again = (whole, whole, whole or recompute is Recompute.selective, whole or recompute is Recompute.selective)
    heads = (m.heads + 2 * m.kv_heads) * m.head_dim
    shapes = (m.hidden, heads), (m.heads * m.head_dim, m.hidden), (m.hidden, 2 * m.ffn), (m.ffn, m.hidden)
    taken, operations = 0.0, 0.0
    for (inner, outer), repeated in zip(shapes, again, strict=True):
        taken += m.layers * _product(r, tokens, inner, outer, 1 + repeated, device)
        operations += m.layers * (3 + repeated) * 2 * tokens * inner * outer
    chunk = min(r.layout.loss_chunk or tokens, tokens)
    forward = 1 + (r.layout.loss_chunk is not None)
    taken += tokens / chunk * _product(r, chunk, m.hidden, m.vocab, forward, device)
    operations += (2 + forward) * 2 * tokens * m.hidden * m.vocab
    down, up = _attention(r, lengths, device)
    pairs = 4 * m.heads * m.head_dim * m.layers * sum(n * (n + 1) // 2 for n in lengths)
    times = 1 + (recompute is Recompute.full)
    return {
        "products": (taken, operations),
        "attention": (times * m.layers * down, times * pairs),
        "attention backward": (m.layers * up, 2.5 * pairs),  # five products for two (arXiv 2307.08691)
    }


def _product(r: Recipe, tokens: int, inner: int, outer: int, forward: int, device: torch.device) -> float:
    """Seconds of so many forward products, and of the two backward ones."""
    x, weight, gradient = (
        torch.randn(shape, device=device, dtype=dtype_of(r))
        for shape in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    ways = (lambda: F.linear(x, weight)), (lambda: gradient @ weight), (lambda: gradient.t() @ x)
    once, of_input, of_weight = (_seconds(way, device) for way in ways)
    return forward * once + of_input + of_weight


def _attention(r: Recipe, lengths: tuple[int, ...], device: torch.device) -> tuple[float, float]:
    """Seconds of one layer's kernel, forward and backward."""
    m, tokens = r.model, sum(lengths)
    q, k, v = (
        torch.randn(tokens, heads, m.head_dim, device=device, dtype=dtype_of(r), requires_grad=True)
        for heads in (m.heads, m.kv_heads, m.kv_heads)
    )
    packed = packed_of(m, lengths, device)

    def forward() -> torch.Tensor:
        return attend(q, k, v, packed, 1 / math.sqrt(m.head_dim))

    out = forward()
    gradient = torch.randn_like(out)
    with torch.no_grad():
        down = _seconds(forward, device)
    return down, _seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median, after once for warming up."""
    taken = [timed(work, device)[1] for _ in range(1 + REPEATS)]
    return statistics.median(taken[1:])
