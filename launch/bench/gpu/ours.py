"""The embedded engine's steps on one GPU, in this process."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import WARM_UP, RandomTokens, device_here, dtype_of, random_weights
from launch.bench.gpu.timing import timed
from launch.cluster.rendezvous import open_store
from launch.megatron.rank import Rank
from launch.megatron.rank_place import Place
from launch.model.recompute import pieces_of
from recipes.config import Recipe, Recompute

SHOWN = 40  # kernels of a profile
Write = Callable[[dict[str, Any]], None]


def measure_embedded(planned: Planned, known: dict[str, Any], write: Write) -> None:
    """Train the steps that are left. Write `seconds` of each step so far, `loss` of the first, `peak` in bytes and the `attention`
    kernel, after every step."""
    seconds = [*known.get("seconds", ())]
    with warm_rank(planned) as rank:
        for step in range(len(seconds), planned.case.steps):
            figures, taken = timed(partial(rank.train_step, step), rank.device)
            seconds.append(taken)
            loss = figures["loss"] if step == 0 else known.get("loss")
            known = {"seconds": seconds, "loss": loss, "peak": rank.peak_memory()}
            write({**known, "attention": planned.recipe.gpu.attention.value})


def profile_embedded(planned: Planned, known: dict[str, Any], write: Write) -> None:
    """Run one step under PyTorch's profiler. Write its `seconds`, and `kernels`: [name, calls, seconds] of the longest ones."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    r = planned.recipe.gpu.attention
    with warm_rank(planned) as rank, torch.profiler.profile(activities=activities) as profile:
        _, seconds = timed(partial(rank.train_step, 0), rank.device)
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, own))
    kernels = [[event.key[:160], event.count, getattr(event, own) / 1e6] for event in events[:SHOWN]]
    total = sum(getattr(event, own) for event in events) / 1e6
    write({"seconds": [seconds] * planned.case.steps, "kernels": kernels, "all_kernels": total, "attention": r.value})


@contextlib.contextmanager
def warm_rank(planned: Planned) -> Iterator[Rank]:
    """Start the rank of a case, with everything done that a training run does once: kernels compiled for more than one length, host
    memory pinned, and the optimizer's moments made by an update at learning rate 0."""
    r, sequences = planned.recipe, planned.case.sequences
    short = [min(length, max(sequences)) for length in (WARM_UP, WARM_UP - 2048)]
    with rank_of(planned, short) as rank:
        say("built")
        longest = max(map(sum, planned.batches))
        if r.layout.offload and rank.device.type == "cuda":
            _pin(r, longest)
            say("pinned")
        for number in range(len(short)):
            rank.sequence_gradient(len(sequences) + number)
        _compile_swiglu(r, longest, rank.device)
        for group in rank.optimizer.param_groups:
            group["lr"] = 0.0
        rank.optimizer.step()
        if rank.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        say("warm")
        yield rank


@contextlib.contextmanager
def rank_of(planned: Planned, further: Sequence[int] = ()) -> Iterator[Rank]:
    """Start the rank of a case in this process, on random weights and tokens. further: lengths of sequences that are in no step."""
    gc.collect()  # an earlier rank is part of reference cycles, which hold the GPU's memory
    r = planned.recipe
    store, port = open_store("127.0.0.1")
    data: Any = RandomTokens([*planned.case.sequences, *further], r.model.vocab)
    read = random_weights(r, device_here())
    try:
        rank = Rank(r, Place(0, 0, "127.0.0.1", port), (data, planned.plan.schedule), None, read)
        yield rank
    finally:
        Rank.leave()
        del store


def say(what: str) -> None:
    """Write to the log of the measurement how far it is."""
    print(
        f"{time.process_time():.0f} s of CPU, {time.time() - psutil.Process().create_time():.0f} s: {what}", flush=True
    )


def _compile_swiglu(r: Recipe, tokens: int, device: torch.device) -> None:
    """Compile Megatron's SwiGLU for a micro-batch of `tokens`: tensors of over 2^31 numbers need other kernels."""
    x = torch.zeros(tokens, 1, 2 * r.model.ffn, device=device, dtype=dtype_of(r), requires_grad=True)
    with torch.no_grad():
        bias_swiglu_impl(x.detach(), None)
    out = bias_swiglu_impl(x, None)
    out.backward(torch.zeros_like(out))


def _pin(r: Recipe, tokens: int) -> None:
    """Pin the host memory that a micro-batch of `tokens` offloads. PyTorch keeps it for later use."""
    m, held = r.model, []
    shapes = [(tokens, m.hidden)]
    if r.layout.recompute is Recompute.linear:
        shapes.append((tokens, m.heads * m.head_dim))
    saved = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    if r.layout.recompute is Recompute.linear:
        saved.append(torch.empty(m.heads, tokens, device="meta"))
    for _ in range(m.layers):
        held += [torch.empty_like(piece, device="cpu", pin_memory=True) for piece in pieces_of(saved)]
