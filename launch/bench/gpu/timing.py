"""Timing of work that a GPU runs asynchronously."""

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Return the work's result, and the seconds until the device has completed it."""
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def spin_up(device: torch.device, seconds: float = 1.0) -> None:
    """Keep the GPU busy until its clock has left the idle state."""
    if device.type != "cuda":
        return
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize(device)
