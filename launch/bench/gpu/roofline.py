"""A lower bound of a step's time on this device: the time of its matrix products and of its attention, each measured alone at the
step's shapes. It includes no other operations and no waiting."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import device_here, dtype_of
from launch.bench.gpu.ours import Write
from launch.bench.gpu.timing import spin_up, timed
from launch.model.attention import packed_of
from launch.model.attention_kernels import attend
from recipes.config import Recipe, Recompute

REPEATS = 3


def measure_roofline(planned: Planned, known: dict[str, Any], write: Write) -> None:
    """Measure the parts of a step. Write `parts` and `tflops`, seconds and rates of the products, attention, and attention's backward
    pass; both count what the layout recomputes. `seconds` has their sum, once for each step of the case."""
    r, device = planned.recipe, device_here()
    assert not r.model.experts, "only dense models are supported"
    spin_up(device)
    seconds = dict.fromkeys(("products", "attention", "attention backward"), 0.0)
    work = dict(seconds)
    for lengths, count in Counter(map(tuple, planned.batches)).items():
        for name, (batch_seconds, operations) in _batch(r, lengths, device).items():
            seconds[name] += count * batch_seconds
            work[name] += count * operations
    rates = {name: work[name] / seconds[name] / 1e12 for name in seconds}
    total = [sum(seconds.values())] * planned.case.steps
    write({"seconds": total, "parts": seconds, "tflops": rates, "attention": r.gpu.attention.value})


def _batch(r: Recipe, lengths: tuple[int, ...], device: torch.device) -> dict[str, tuple[float, float]]:
    """Return the seconds and the operations of each part of one micro-batch."""
    m, recompute = r.model, r.layout.recompute
    tokens, whole_layer = sum(lengths), recompute in (Recompute.linear, Recompute.full)
    mlp = whole_layer or recompute is Recompute.selective
    recomputed = whole_layer, whole_layer, mlp, mlp  # for each of `shapes`
    heads = (m.heads + 2 * m.kv_heads) * m.head_dim
    shapes = (m.hidden, heads), (m.heads * m.head_dim, m.hidden), (m.hidden, 2 * m.ffn), (m.ffn, m.hidden)
    taken, operations = 0.0, 0.0
    for (inner, outer), repeated in zip(shapes, recomputed, strict=True):
        taken += m.layers * _product(r, tokens, inner, outer, 1 + repeated, device)
        operations += m.layers * (3 + repeated) * 2 * tokens * inner * outer
    chunk = min(r.layout.loss_chunk or tokens, tokens)
    forward = 1 + (r.layout.loss_chunk is not None)
    taken += tokens / chunk * _product(r, chunk, m.hidden, m.vocab, forward, device)
    operations += (2 + forward) * 2 * tokens * m.hidden * m.vocab
    attention_forward, attention_backward = _attention(r, lengths, device)
    pairs = 4 * m.heads * m.head_dim * m.layers * sum(n * (n + 1) // 2 for n in lengths)
    times = 1 + (recompute is Recompute.full)
    return {
        "products": (taken, operations),
        "attention": (times * m.layers * attention_forward, times * pairs),
        # The backward pass has five products, the forward pass two (arXiv 2307.08691).
        "attention backward": (m.layers * attention_backward, 2.5 * pairs),
    }


def _product(r: Recipe, tokens: int, inner: int, outer: int, forward: int, device: torch.device) -> float:
    """Return the seconds of `forward` forward products and of the two backward products, at one shape."""
    x, weight, gradient = (
        torch.randn(shape, device=device, dtype=dtype_of(r))
        for shape in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    products = (lambda: F.linear(x, weight)), (lambda: gradient @ weight), (lambda: gradient.t() @ x)
    forward_once, input_gradient, weight_gradient = (_seconds(product, device) for product in products)
    return forward * forward_once + input_gradient + weight_gradient


def _attention(r: Recipe, lengths: tuple[int, ...], device: torch.device) -> tuple[float, float]:
    """Return the seconds of one layer's attention kernel, forward and backward."""
    m, tokens = r.model, sum(lengths)
    q, k, v = (
        torch.randn(tokens, heads, m.head_dim, device=device, dtype=dtype_of(r), requires_grad=True)
        for heads in (m.heads, m.kv_heads, m.kv_heads)
    )
    packed = packed_of(m, lengths, device)

    def forward() -> torch.Tensor:
        return attend(r.gpu.attention, q, k, v, packed, lengths, 1 / math.sqrt(m.head_dim))

    out = forward()
    gradient = torch.randn_like(out)
    with torch.no_grad():
        forward_seconds = _seconds(forward, device)
    return forward_seconds, _seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), device)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of `work`, after one warm-up."""
    taken = [timed(work, device)[1] for _ in range(1 + REPEATS)]
    return statistics.median(taken[1:])
