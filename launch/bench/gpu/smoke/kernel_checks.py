"""Attention's kernels on this GPU: whether each is right, and how fast it is."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from launch.bench.gpu.smoke.outcome import Bench, Outcome, relative, synchronize
from launch.bench.gpu.theirs import sdpa_backend
from launch.bench.gpu.timing import spin_up
from launch.model.attention import keys_of_chunks, zigzag_chunks, zigzag_positions
from launch.model.attention_kernels import VARLEN_KERNELS, attend, causal
from launch.model.attention_reuse import CachedCall
from launch.model.offload_streams import onto
from recipes.config import AttentionKernel, Recipe
from recipes.errors import PreflightError

LIMIT = 1e-2  # relative error of a bf16 kernel; inputs in bf16 alone give about 3e-3
RANKS = 4  # context-parallel ranks of which one is computed
TIMED = 5
NEW_LENGTHS = (20_011, 24_023, 28_031)
Attend = Callable[..., Tensor]  # queries, keys, values, and the lengths of the sequences


def inputs(bench: Bench, lengths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values for packed sequences, and the gradient of the result. Values are a strided view, as they are
    in a layer."""
    heads, kv_heads, d = bench.heads
    tokens = sum(lengths)
    new = torch.Generator(bench.device).manual_seed(tokens)
    q, k, both, gradient = (
        torch.randn(tokens, n, width, generator=new, device=bench.device, dtype=bench.dtype)
        for n, width in ((heads, d), (kv_heads, d), (kv_heads, 3 * d), (heads, d))
    )
    return [x.requires_grad_() for x in (q, k, both[..., d : 2 * d])], gradient


def described(lengths: Sequence[int], device: torch.device) -> PackedSeqParams:
    """Describe packed sequences as Megatron does."""
    boundaries = onto(device, torch.tensor([0, *lengths]).cumsum(0).int())
    return PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


def kernels(bench: Bench) -> dict[str, Attend]:
    """Return the engine's kernels. On a CPU all are the same SDPA."""
    scale = 1 / math.sqrt(bench.heads[2])

    def attention(kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        return attend(kernel, q, k, v, described(lengths, bench.device), lengths, scale)

    return {kernel.value: partial(attention, kernel) for kernel in AttentionKernel}


def reference(bench: Bench, parts: Sequence[Tensor], gradient: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return the result and the three gradients in fp32, sequence by sequence, by plain matrix products."""
    heads, kv_heads, d = bench.heads
    leaves = [x.detach().float().requires_grad_() for x in parts]
    outs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in leaves), strict=True):
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
        hidden = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.float())]


def check_kernels(bench: Bench) -> Iterator[Outcome]:
    """Compare every kernel with fp32: result and gradients, the reuse of its result, and one context-parallel rank."""
    parts, gradient = inputs(bench, bench.lengths)
    wanted = reference(bench, parts, gradient, bench.lengths)
    for name, kernel in kernels(bench).items():
        try:
            out = kernel(*parts, bench.lengths)
            found = [out.detach(), *torch.autograd.grad(out, parts, gradient)]
            errors = [relative(*pair) for pair in zip(found, wanted, strict=True)]
            said = ", ".join(
                f"{what} {error:.1e}" for what, error in zip(("out", "dq", "dk", "dv"), errors, strict=True)
            )
            again = _reused(kernel, bench, parts, gradient)
            worst = max(relative(*pair) for pair in zip(again, wanted, strict=True))
            same = torch.equal(again[0], found[0])
            good = all(error < LIMIT for error in [*errors, worst]) and same
            yield Outcome(f"attention by {name}", f"{said}; its result reused {worst:.1e}", good)
        except PreflightError as error:
            yield Outcome(f"attention by {name}", f"not here: {error.problem}")
        except Exception as error:
            yield Outcome(f"attention by {name}", f"{type(error).__name__}: {str(error).splitlines()[0]}", False)
    yield from _context_parallel(bench)


def _reused(kernel: Attend, bench: Bench, parts: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Return result and gradients of a second pass, which reuses the first one's result. The first inputs are poisoned before it, so
    that reading them shows."""
    first = [_copied(x) for x in parts]
    cached = CachedCall()
    run = lambda q, k, v: kernel(q, k, v, bench.lengths)  # noqa: E731
    with torch.no_grad():
        cached.run(run, *first)
    for x in first:
        x.fill_(torch.nan)
    out = cached.run(run, *parts)
    return [out.detach(), *torch.autograd.grad(out, parts, gradient)]


def _copied(x: Tensor) -> Tensor:
    """Return a copy in a storage of its own, with the same layout there."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=x.device)
    return storage.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x.detach())


def _context_parallel(bench: Bench) -> Iterator[Outcome]:
    """Compute one of four context-parallel ranks by every kernel that can, and compare with the whole sequences."""
    rank, unit = 1, 2 * RANKS * (64 if bench.on_gpu else 2)
    lengths = (unit, 5 * unit, 2 * unit)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    (q, k, v), gradient = inputs(bench, lengths)
    own = [
        torch.cat([start + zigzag_positions(n, RANKS, one) for start, n in zip(starts, lengths, strict=True)]).to(
            q.device
        )
        for one in range(RANKS)
    ]
    chunks = zigzag_chunks(lengths, bench.device, RANKS, rank)
    keys, values = (
        keys_of_chunks(torch.stack([x[p] for p in own]), [n // RANKS for n in lengths], rank) for x in (k, v)
    )
    wanted = reference(bench, (q, k, v), gradient, lengths)[0][own[rank]]
    for kernel in (AttentionKernel.varlen, AttentionKernel.flash4):
        name = f"a context-parallel rank by {kernel.value}"
        try:
            found = _chunked(bench, kernel, (q[own[rank]], keys, values), chunks).detach()
        except PreflightError as error:
            yield Outcome(name, f"not here: {error.problem}")
            continue
        yield Outcome(name, f"out {relative(found, wanted):.1e}", relative(found, wanted) < LIMIT)


def _chunked(bench: Bench, kernel: AttentionKernel, parts: Sequence[Tensor], chunks: PackedSeqParams) -> Tensor:
    """Attend from a rank's chunks to their keys; on a CPU by the stand-in."""
    scale = 1 / math.sqrt(bench.heads[2])
    if bench.on_gpu:
        return VARLEN_KERNELS[kernel](*parts, chunks, scale)
    queries, keys = (boundaries.diff().tolist() for boundaries in (chunks.cu_seqlens_q, chunks.cu_seqlens_kv))
    of_chunks = zip(*(x.split(n) for x, n in zip(parts, (queries, keys, keys), strict=True)), strict=True)
    return torch.cat([causal(q, k, v, scale, _last_rows(len(q), len(k))) for q, k, v in of_chunks])


def _last_rows(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def race(bench: Bench, recipe: Recipe) -> Iterator[Outcome]:
    """Time every kernel on one long sequence, forward and backward, and SDPA as transformers calls it."""
    heads, _, d = bench.heads
    pairs = 4 * heads * d * bench.raced * (bench.raced + 1) / 2
    raced: dict[str, Attend] = kernels(bench)
    raced["SDPA by itself"] = lambda q, k, v, lengths: causal(q, k, v, 1 / math.sqrt(d))
    seconds: dict[str, float] = {}
    rates: dict[str, tuple[float, float]] = {}
    for name, kernel in raced.items():
        try:
            spin_up(bench.device, 0.3)
            forward, backward, first, fresh = _timed(bench, kernel)
        except Exception as error:
            yield Outcome(f"race: {name}", f"{type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        seconds[name] = forward + backward
        rates[name] = pairs / forward / 1e12, 2.5 * pairs / backward / 1e12
        said = f"; {sdpa_backend(*bench.heads, bench.device, bench.dtype)}" if name == "SDPA by itself" else ""
        yield Outcome(
            f"race: {name}",
            f"forward {forward * 1e3:.1f} ms, {rates[name][0]:.0f} TFLOP/s; backward {backward * 1e3:.1f} ms, "
            f"{rates[name][1]:.0f} TFLOP/s; first call {first:.1f} s, at a new length {fresh * 1e3:.0f} ms more{said}",
            numbers={"forward": forward, "backward": backward, "first": first, "new_length": fresh},
        )
    own = {name: seconds[name] for name in seconds if name in {k.value for k in AttentionKernel}}
    best = min(own, key=lambda name: own[name])
    used = recipe.gpu.attention.value
    slower = own.get(used, math.inf) / own[best]
    yield Outcome(
        "the recipe's kernel",
        f"gpu.attention={used} takes {slower:.2f} times as long as the fastest, gpu.attention={best}",
        slower < 1.03 if bench.on_gpu else None,
        {"best": best},
    )


def _timed(bench: Bench, kernel: Attend) -> tuple[float, float, float, float]:
    """Return median seconds forward and backward, seconds of the first call, and seconds that a call at a new length takes longer."""
    parts, gradient = inputs(bench, (bench.raced,))

    def once(parts: list[Tensor], gradient: Tensor, length: int) -> tuple[float, float]:
        synchronize(bench.device)
        started = time.perf_counter()
        out = kernel(*parts, (length,))
        synchronize(bench.device)
        half = time.perf_counter()
        torch.autograd.grad(out, parts, gradient)
        synchronize(bench.device)
        return half - started, time.perf_counter() - half

    first = sum(once(parts, gradient, bench.raced))
    taken = [once(parts, gradient, bench.raced) for _ in range(TIMED)]
    fresh = []
    for length in NEW_LENGTHS if bench.on_gpu else (100,):
        shorter = [x.detach()[:length].requires_grad_() for x in parts]
        new, again = (sum(once(shorter, gradient[:length], length)) for _ in range(2))
        fresh.append(new - again)
    forward, backward = (statistics.median(column) for column in zip(*taken, strict=True))
    return forward, backward, first, statistics.median(fresh)
