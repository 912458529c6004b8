"""Copies between a GPU and the host's pinned memory, beside the computation. On a CPU they are made at once."""

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BESIDE = 1  # copies to the host that may be under way while the computation goes on


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device was asked for before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class Coming:
    """Tensors on their way from the host."""

    tensors: list[Tensor]
    done: Any  # a CUDA event; None on a CPU


class Lane:
    """CUDA streams of copies, one each way, as PCIe moves both at once. The computation's stream allocates and frees all memory, and
    waits for copies where it must: so how much is held does not depend on how far ahead of the GPU the process is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._back = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._leaving: deque[tuple[Any, list[Tensor]]] = deque()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Memory of the host for a tensor of this size and layout."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self._out is not None)

    def leave(self, tensors: list[Tensor], hosts: list[Tensor]) -> None:
        """Starts to copy the tensors, which nobody may change any more, and lets go of those copied before."""
        with self._after_computation(self._out):
            for tensor, host in zip(tensors, hosts, strict=True):
                host.copy_(tensor, non_blocking=True)
        self._leaving.append((_event(self._out), tensors))
        self._let_go(BESIDE)

    def arrive(self) -> None:
        """Makes the computation wait for all that left."""
        self._let_go(0)

    def finish(self) -> None:
        """Waits on the host for all copies: it may then read and write its memory."""
        for stream in (self._out, self._back):
            if stream is not None:
                stream.synchronize()

    def come(self, hosts: list[Tensor]) -> Coming:
        """Starts to copy back, once all that the computation was asked for before is done."""
        tensors = [torch.empty_like(host, device=self.device) for host in hosts]
        with self._after_computation(self._back):
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
        return Coming(tensors, _event(self._back))

    def wait(self, coming: Coming) -> list[Tensor]:
        """The tensors, for which the computation waits."""
        if coming.done is not None:
            torch.cuda.current_stream(self.device).wait_event(coming.done)
        return coming.tensors

    def _let_go(self, most: int) -> None:
        while len(self._leaving) > most:
            done, _ = self._leaving.popleft()
            if done is not None:
                torch.cuda.current_stream(self.device).wait_event(done)

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
