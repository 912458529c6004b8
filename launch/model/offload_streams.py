"""Copies between a GPU and pinned host memory that overlap with computation. On a CPU the copies are synchronous."""

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_OVERLAPPING_COPIES = 1  # copies to the host that may run while the computation goes on


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a CPU tensor on `device`, without waiting for work that the device has already queued."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class PendingCopy:
    """Device tensors that a copy from the host is filling."""

    tensors: list[Tensor]
    event: Any  # a CUDA event recorded after the copy; None on a CPU


class CopyStreams:
    """Two CUDA streams for copies, one in each direction, because PCIe transfers both ways at once.

    The compute stream allocates and frees all device memory, and waits for a copy before it frees or uses the memory. So peak
    memory does not depend on how far the host process runs ahead of the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._to_host, self._to_device = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)
        )
        self._unfinished: deque[tuple[Any, list[Tensor]]] = deque()  # events, and the device tensors they keep alive

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Allocate host memory with the tensor's size and layout."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self._to_host is not None)

    def copy_to_host(self, tensors: list[Tensor], hosts: list[Tensor]) -> None:
        """Start to copy `tensors` into `hosts`, and release the device tensors of earlier copies. Nobody may change `tensors` any
        more."""
        with self._after_computation(self._to_host):
            for tensor, host in zip(tensors, hosts, strict=True):
                host.copy_(tensor, non_blocking=True)
        self._unfinished.append((_event(self._to_host), tensors))
        self._wait_until_at_most(MAX_OVERLAPPING_COPIES)

    def wait_for_host_copies(self) -> None:
        """Make the compute stream wait for all copies to the host."""
        self._wait_until_at_most(0)

    def synchronize(self) -> None:
        """Block the host until all copies are complete. After that it may read and write the host memory."""
        for stream in (self._to_host, self._to_device):
            if stream is not None:
                stream.synchronize()

    def copy_to_device(self, hosts: list[Tensor], tensors: list[Tensor] | None = None) -> PendingCopy:
        """Start to copy `hosts` back to the device, after all computation queued so far. tensors: where to; new ones if None."""
        if tensors is None:
            tensors = [torch.empty_like(host, device=self.device) for host in hosts]
        with self._after_computation(self._to_device):
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
        return PendingCopy(tensors, _event(self._to_device))

    def wait(self, pending: PendingCopy) -> list[Tensor]:
        """Return the device tensors of a pending copy, and make the compute stream wait for it."""
        if pending.event is not None:
            torch.cuda.current_stream(self.device).wait_event(pending.event)
        return pending.tensors

    def _wait_until_at_most(self, unfinished: int) -> None:
        while len(self._unfinished) > unfinished:
            event, _ = self._unfinished.popleft()
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    @contextlib.contextmanager
    def _after_computation(self, stream: Any) -> Any:
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield


def _event(stream: Any) -> Any:
    return None if stream is None else stream.record_event()
