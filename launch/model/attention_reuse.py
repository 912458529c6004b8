"""A function's result, kept from a first pass to a second one that computes its inputs again but not itself.

For attention's kernel under recomputation: of all that a layer does, its cost alone grows with the square of the length. Whatever
kernel it is, autograd's graph of the first pass is kept without the inputs, and reads the second pass's in their place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class _View(NamedTuple):
    """A saved tensor that is a view of an input: of which, and how it lies in its storage."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Kept:
    """One call of a function of tensors with one result, and the same call again.

    tensors: what waits in between, the result among them; may be moved elsewhere until `run` is called again.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._inputs: tuple[Tensor, ...] = ()
        self._entries: list[GradientEdge] = []
        self._exit: GradientEdge | None = None

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """First the function's result, without a graph; then the same with one to these inputs, which must lie in memory as the
        first ones did and must hold the same numbers."""
        if self._exit is None:
            return self._first(function, inputs)
        out: Tensor = _Again.apply(self, *inputs)
        return out

    def _first(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        number = {x.untyped_storage().data_ptr(): i for i, x in enumerate(inputs)}

        def pack(tensor: Tensor) -> int | _View:
            place = number.get(tensor.untyped_storage().data_ptr())
            if place is not None:
                return _View(place, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))
            return self._keep(tensor)

        def unpack(packed: int | _View) -> Tensor:
            if isinstance(packed, _View):
                return self._inputs[packed.number].as_strided(packed.size, packed.stride, packed.offset)
            return self.tensors[packed]

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            entered = _Enter.apply(torch.empty(0, requires_grad=True), *inputs)
            out = function(*entered)
        self._entries, self._exit = [get_gradient_edge(x) for x in entered], get_gradient_edge(out)
        result = out.detach()
        self._place = self._keep(result)
        return result

    def _keep(self, tensor: Tensor) -> int:
        """Its number among the tensors, where each is once however many operations save it."""
        for number, other in enumerate(self.tensors):
            if _same(tensor, other):
                return number
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def result(self) -> Tensor:
        return self.tensors[self._place]

    def gradients(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
        """Of the inputs."""
        assert self._exit is not None
        self._inputs = inputs
        found = torch.autograd.grad([self._exit], self._entries, [gradient])
        self._inputs, self.tensors = (), []
        return found


def _same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.size() == b.size() and a.stride() == b.stride()
    return alike and a.data_ptr() == b.data_ptr()


class _Enter(torch.autograd.Function):
    """A place in the graph at which the inputs' gradients are taken out; unlike leaves, it holds no tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("gradients are taken out before")


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Kept, *inputs: Tensor) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(*inputs)
        return kept.result().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kept.gradients(ctx.saved_tensors, gradient)
