"""Copies between GPU and host, an optimizer whose state is on the host, and collectives."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.bench.gpu.smoke.outcome import Bench, Outcome, group_of_one, synchronize
from launch.megatron.host_adam import PIECE, HostAdam
from launch.megatron.rank_place import ALLOCATOR
from launch.model.offload_streams import CopyStreams

BUSY = 200_000_000  # cycles of a kernel that keeps the GPU busy, about 0.1 s
STEPS = 3


def check_copies(bench: Bench) -> Iterator[Outcome]:
    """Copy to the host and back while the GPU is busy, and time it; time how long host memory takes to be pinned."""
    copies, size = CopyStreams(bench.device), bench.copied
    if bench.on_gpu:
        usual = _pinned_seconds(size, "pinned_use_cuda_host_register:False")
        threaded = _pinned_seconds(size, ALLOCATOR)
        figure = f"{usual:.2f} s a GiB; registered by 8 threads {threaded:.2f}"
        yield Outcome("pinning host memory", figure, numbers={"pinned": usual, "threads": threaded})
    there = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    wanted = there.cpu()
    hosts = [copies.empty_like(there), copies.empty_like(there).fill_(7)]

    def out() -> None:
        copies.copy_to_host([there], hosts[:1])
        copies.wait_for_host_copies()

    def back() -> None:
        copies.wait(copies.copy_to_device(hosts[:1]))

    def both() -> None:
        copies.copy_to_host([there], hosts[1:])
        copies.wait(copies.copy_to_device(hosts[:1]))
        copies.wait_for_host_copies()

    rates = {}
    for name, work in {"to the host": out, "back": back, "both": both}.items():
        rates[name] = max(size / _seconds(work, bench) / 1e9 for _ in range(2))
    if bench.on_gpu:
        torch.cuda._sleep(BUSY)
    changed = there.add(1)  # queued behind the busy kernel: a copy that does not wait reads the old values
    copies.copy_to_host([changed], hosts[:1])
    copies.wait_for_host_copies()
    pending = copies.copy_to_device(hosts[:1])
    (returned,) = copies.wait(pending)
    right = torch.equal(returned.cpu(), wanted.add(1))
    figure = ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in rates.items())
    yield Outcome("copies to the host and back", f"{figure}; bit for bit: {'yes' if right else 'no'}", right, rates)


def _pinned_seconds(size: int, options: str) -> float:
    """Return the seconds to pin `size` bytes for the first time."""
    set_allocator: Callable[[str], None] = torch._C._accelerator_setAllocatorSettings
    set_allocator(options)
    held, started = [], time.perf_counter()
    for _ in range(size // 2**26):
        held.append(torch.empty(2**26, dtype=torch.uint8, pin_memory=True))
    taken = (time.perf_counter() - started) * 2**30 / size
    del held
    torch._C._host_emptyCache()
    return taken


def _seconds(work: Callable[[], Any], bench: Bench) -> float:
    synchronize(bench.device)
    started = time.perf_counter()
    work()
    synchronize(bench.device)
    return time.perf_counter() - started


def check_host_adam(bench: Bench) -> Iterator[Outcome]:
    """Compare an optimizer whose state is on the host with PyTorch's fused AdamW, bit for bit."""
    size = PIECE + 12_345 if bench.on_gpu else 1000
    options: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    start = torch.randn(size, device=bench.device)
    usual = start.clone().requires_grad_()
    plain = torch.optim.AdamW([usual], fused=True, **options)
    parameter: Any = start.clone()
    on_host = HostAdam([{"params": [parameter], **options}], CopyStreams(bench.device))
    for _ in range(STEPS):
        gradient = torch.randn_like(start)
        usual.grad = gradient.clone()
        parameter.decoupled_grad = gradient.clone()
        plain.step()
        on_host.step()
    on_host.finish()
    states = on_host.state[parameter]
    moments = [torch.equal(plain.state[usual][n].cpu(), states[n].cpu()) for n in ("exp_avg", "exp_avg_sq")]
    same = torch.equal(parameter, usual.detach()) and all(moments)
    yield Outcome("optimizer on the host", f"{STEPS} steps, bit for bit: {'yes' if same else 'no'}", same)


def check_collectives(bench: Bench) -> Iterator[Outcome]:
    """Run the collectives of training in a group of one rank."""
    x = torch.randn(1 << 20, device=bench.device)
    found: list[Tensor] = [x.clone(), torch.empty_like(x), torch.empty_like(x)]
    with group_of_one(bench):
        backend = dist.get_backend()
        dist.all_reduce(found[0])
        dist.reduce_scatter_tensor(found[1], x)
        dist.all_gather_into_tensor(found[2], x)
        same = all(torch.equal(one, x) for one in found)
    yield Outcome(f"collectives by {backend}", "all-reduce, reduce-scatter, all-gather of one rank", same)
