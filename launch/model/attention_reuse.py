"""Reuse of a function's result: a second pass recomputes the function's inputs, but not the function itself.

It serves attention's kernel under recomputation, because only the kernel's cost grows with the square of the length. It works for
any kernel: autograd's graph of the first pass is saved without the inputs, and reads the second pass's inputs instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class _View(NamedTuple):
    """A saved tensor that is a view of input `number`, with its layout in the input's storage."""

    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class CachedCall:
    """One call of a function that maps tensors to one tensor, and its repetition in a second pass.

    tensors: what must be saved between the two passes, including the result. The caller may move them elsewhere, and must put them
    back before the second `run`.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._inputs: tuple[Tensor, ...] = ()
        self._input_edges: list[GradientEdge] = []
        self._result_edge: GradientEdge | None = None

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the function's result. The first call returns it without a graph; the second returns it with a graph to the new
        inputs. The second inputs must have the memory layout and the values of the first."""
        if self._result_edge is None:
            return self._first(function, inputs)
        out: Tensor = _Reused.apply(self, *inputs)
        return out

    def _first(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        input_of_storage = {x.untyped_storage().data_ptr(): i for i, x in enumerate(inputs)}

        def pack(tensor: Tensor) -> int | _View:
            number = input_of_storage.get(tensor.untyped_storage().data_ptr())
            if number is not None:
                return _View(number, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))
            return self._save(tensor)

        def unpack(packed: int | _View) -> Tensor:
            if isinstance(packed, _View):
                return self._inputs[packed.number].as_strided(packed.size, packed.stride, packed.offset)
            return self.tensors[packed]

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            entered = _InputBoundary.apply(torch.empty(0, requires_grad=True), *inputs)
            out = function(*entered)
        self._input_edges, self._result_edge = [get_gradient_edge(x) for x in entered], get_gradient_edge(out)
        result = out.detach()
        self._result_number = self._save(result)
        return result

    def _save(self, tensor: Tensor) -> int:
        """Add a tensor to `tensors` unless it is already there, and return its index. Several operations may save the same
        tensor."""
        for number, other in enumerate(self.tensors):
            if _same(tensor, other):
                return number
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def result(self) -> Tensor:
        """Return the saved result."""
        return self.tensors[self._result_number]

    def gradients(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs, given the result's gradient. Saved tensors are released."""
        assert self._result_edge is not None
        self._inputs = inputs
        of_inputs = torch.autograd.grad([self._result_edge], self._input_edges, [gradient])
        self._inputs, self.tensors = (), []
        return of_inputs


def _same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.size() == b.size() and a.stride() == b.stride()
    return alike and a.data_ptr() == b.data_ptr()


class _InputBoundary(torch.autograd.Function):
    """A node in the graph at which the gradients of the inputs are read. Unlike leaves, it holds no tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("gradients are read before this node")


class _Reused(torch.autograd.Function):
    """The second pass: the saved result in the forward pass, the first pass's graph in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: CachedCall, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call.result().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.call.gradients(ctx.saved_tensors, gradient)
