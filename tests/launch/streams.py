"""CUDA streams and events that stand for order alone, on a CPU: every access to a tensor is checked to come after those that it
must come after, as a GPU would run them.

A stream's clock says how much of each stream is done when its next operation starts (vector clocks, Fidge and Mattern 1988).
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.model.offload_streams import CopyStreams

Moment = tuple[str, int]  # a stream and the number of an operation on it


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: dict[str, int] = {}
        self.finished: dict[str, int] = {}  # for which the host waited

    def synchronize(self) -> None:
        self.finished = dict(self.clock)

    def advance(self) -> Moment:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.name, self.clock[self.name]

    def done(self, moment: Moment) -> bool:
        return self.clock.get(moment[0], 0) >= moment[1]

    def wait_event(self, clock: dict[str, int]) -> None:
        self.clock = {k: max(self.clock.get(k, 0), clock.get(k, 0)) for k in self.clock | clock}

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.clock)

    def record_event(self) -> dict[str, int]:
        return dict(self.clock)


class Streams(TorchDispatchMode):
    """copies: each in the order it was asked for, `out` to the host or `back`, with its moment. freed_early: accesses that were
    not done when their memory was given away."""

    def __init__(self) -> None:
        super().__init__()
        self.computation, self.out, self.back = Stream("computation"), Stream("out"), Stream("back")
        self.current = self.computation
        self.copies: list[tuple[str, Moment]] = []
        self.freed_early: list[Moment] = []
        self._hosts: set[int] = set()
        self._accesses: dict[int, list[tuple[Moment, bool, range]]] = {}

    def copy_streams(self) -> CopyStreams:
        """Copy streams whose GPU is the CPU."""
        copies = CopyStreams(torch.device("cpu"))
        copies._to_host, copies._to_device = self.out, self.back  # type: ignore[assignment]
        return copies

    def under_way(self, kind: str) -> int:
        """Copies that were asked for and that the computation has not waited for."""
        return sum(not self.computation.done(moment) for name, moment in self.copies if name == kind)

    @property
    def host_waited(self) -> bool:
        """For all copies."""
        return all(stream.finished == stream.clock for stream in (self.out, self.back))

    @contextlib.contextmanager
    def at_work(self, monkeypatch: Any) -> Iterator["Streams"]:
        def empty_like(_: CopyStreams, tensor: Tensor) -> Tensor:
            host = torch.empty_like(tensor)
            self._hosts.add(id(host.untyped_storage()))
            return host

        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(CopyStreams, "empty_like", empty_like)
        with self:
            yield self

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), others: Any = None) -> Any:
        if function.is_view:
            return function(*arguments, **(others or {}))
        moment = self.current.advance()
        # New memory was in use up to here; how the tensor looks that it is to be like is known on the host.
        read = () if "empty" in str(function) else zip(arguments, function._schema.arguments, strict=False)
        for argument, described in read:
            for tensor in _tensors(argument):
                self._access(tensor, moment, bool(described.alias_info and described.alias_info.is_write))
        if function is torch.ops.aten.copy_.default and self.current is not self.computation:
            self.copies.append(("out" if id(arguments[0].untyped_storage()) in self._hosts else "back", moment))
        out = function(*arguments, **(others or {}))
        for tensor in _tensors(out):
            if id(tensor.untyped_storage()) not in self._accesses:
                self._access(tensor, moment, True)
        return out

    def _access(self, tensor: Tensor, moment: Moment, writes: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._accesses:
            self._accesses[id(storage)] = []
            weakref.finalize(storage, self._freed, id(storage))
        place = _place(tensor)
        for other, wrote, there in self._accesses[id(storage)]:
            if (writes or wrote) and other != moment and place.start < there.stop and there.start < place.stop:
                assert self.current.done(other), f"{self.current.name} does not wait for {other}"
        self._accesses[id(storage)].append((moment, writes, place))

    def _freed(self, storage: int) -> None:
        """The computation's allocator may give the memory away at once. PyTorch's for pinned memory waits for copies."""
        accesses = self._accesses.pop(storage)
        if storage in self._hosts:
            self._hosts.discard(storage)
        else:
            self.freed_early += [moment for moment, *_ in accesses if not self.computation.done(moment)]


def _place(tensor: Tensor) -> range:
    """Bytes from its first to its last, in its storage."""
    start = tensor.storage_offset() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(start, start + (last + 1) * tensor.element_size())


def _tensors(argument: Any) -> list[Tensor]:
    some = argument if isinstance(argument, list | tuple) else [argument]
    return [x for x in some if isinstance(x, Tensor)]
