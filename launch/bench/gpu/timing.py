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
