"""Bytes of live tensors, real or fake, from the operation that made each storage to its end."""

import contextlib
import functools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.attention.varlen  # its operations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.paths import REPO

LAUNCH = f"{REPO / 'launch'}/"


class Tracker(TorchDispatchMode):
    """Bytes of live storages. peak, at_peak: the most since `start`, and by the operation that made them.
    waits: where the step would wait for a GPU."""

    current: "Tracker | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.host = 0
        self.phase = "build"
        self.at_peak: Counter[str] = Counter()
        self.peak_phase = ""
        self.phase_peaks: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str]] = {}
        self._kernels = 0  # in which one is
        self._to_host = False

    def start(self) -> None:
        self.peak, self.phase_peaks, self.waits = 0, Counter(), Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), others: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.waits[f"{self.phase}: {_place(3)}"] += 1
            dtype = arguments[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        out = function(*arguments, **(others or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor, function)
        if function is torch.ops.torch_attn._varlen_attn_backward.default:
            query, key, boundaries = arguments[1], arguments[2], arguments[6]
            self.see_peak(_flash_workspace(query, key, boundaries), "flash attention's workspace")
        self.see_peak()
        return out

    def _count(self, tensor: Tensor, function: Any) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        size = storage.nbytes()
        self._storages[id(storage)] = (0 if self._to_host else size, f"{function} {self.phase} {_place(4)}")
        if self._to_host:
            self.host += size
        else:
            self.live += size
        weakref.finalize(storage, self._ended, id(storage), size, self._to_host)

    def _ended(self, storage: int, size: int, on_host: bool) -> None:
        del self._storages[storage]
        if on_host:
            self.host -= size
        else:
            self.live -= size

    def see_peak(self, more: int = 0, name: str = "") -> None:
        if self._kernels:
            return
        now = self.live + more
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], now)
        if now > self.peak:
            self.peak, self.peak_phase = now, self.phase
            self.at_peak = Counter()
            for size, label in self._storages.values():
                self.at_peak[label] += size
            if more:
                self.at_peak[name] = more

    @contextlib.contextmanager
    def kernel(self) -> Iterator[None]:
        """Whose tensors in between a GPU never makes."""
        self._kernels += 1
        try:
            yield
        finally:
            self._kernels -= 1

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        self._to_host = True
        try:
            yield
        finally:
            self._to_host = False


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **others: Any) -> Any:
        tracker = Tracker.current
        assert tracker is not None
        with tracker.kernel():
            out = function(*arguments, **others)
        tracker.see_peak()
        return out

    return call


def _flash_workspace(query: Tensor, key: Tensor, boundaries: Tensor) -> int:
    """Bytes that flash attention 2's backward pass takes inside (`mha_varlen_bwd` of its `flash_api.cpp`): fp32 sums of the
    queries' gradients and of products, and gradients of keys and values of every query head where these are grouped."""
    tokens, heads, d = query.shape
    padded = tokens + 128 * (len(boundaries) - 1)
    expanded = 2 * tokens * heads * d * query.element_size() if key.size(1) != heads else 0
    return padded * heads * (d * 4 + 4) + expanded


def _place(depth: int) -> str:
    """The innermost line of this project or of Megatron that asks."""
    frame: FrameType | None = sys._getframe(depth)
    while frame:
        name = frame.f_code.co_filename
        ours = name.startswith(LAUNCH)
        if ours or "site-packages/megatron/" in name:
            short = name.removeprefix(LAUNCH) if ours else name.split("site-packages/")[-1]
            return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
