"""What one check of the smoke step found, and what the checks share: sizes, a process group, errors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.cluster.rendezvous import open_store


@dataclass(frozen=True)
class Outcome:
    """A check with its figure. passed: None if it only informs. numbers: what later commands read."""

    name: str
    figure: str
    passed: bool | None = None
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The device and the sizes: those of Qwen3-4B on a GPU, small ones for the stand-ins on a CPU."""

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, and their width."""
        return (32, 8, 128) if self.on_gpu else (4, 2, 16)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (2, 129, 4096, 777) if self.on_gpu else (2, 9, 40, 7)

    @property
    def raced(self) -> int:
        """Tokens of the sequence on which attention's kernels are timed."""
        return 32_768 if self.on_gpu else 256

    @property
    def copied(self) -> int:
        """Bytes of the copies between GPU and host."""
        return 2**30 if self.on_gpu else 2**20

    @property
    def shape(self) -> str:
        """Overrides of the model that ranks train."""
        if self.on_gpu:
            return "model.layers=2"
        small = "model.hidden=64 model.ffn=128 model.heads=4 model.kv_heads=2 model.head_dim=16 model.vocab=512"
        return f"model.layers=2 {small} model.native_context=2048"


@contextlib.contextmanager
def group_of_one(bench: Bench) -> Iterator[Any]:
    """Make this process the only rank of a process group. Yield the group."""
    store, port = open_store("127.0.0.1")
    client = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    backend = "nccl" if bench.on_gpu else "gloo"
    dist.init_process_group(backend, store=client, world_size=1, rank=0, timeout=timedelta(seconds=60))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        del store


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference as a share of the wanted tensor's norm; NaN stays NaN."""
    wanted = wanted.float()
    return float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
