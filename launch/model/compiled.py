"""Several operations on a tensor as one kernel on a GPU, where each of them alone would read and write all of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where its first tensor is on a GPU; on a CPU, where compiling takes longer than it saves, as it is.

    Compiled once for any number of tokens, the first tensor's first dimension, and once for every other size: kernels that know how
    many numbers they sum are faster.
    """
    compiled = torch.compile(function)

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return function(first, *others)
        for tensor in (first, *others):
            if isinstance(tensor, Tensor):
                _mark(tensor, first.size(0))
        return compiled(first, *others)

    return call


def _mark(tensor: Tensor, tokens: int) -> None:
    """Says which dimensions differ from call to call."""
    for dimension, size in enumerate(tensor.shape):
        if dimension == 0 and size == tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # not a must: a weight may have as many rows
        else:
            torch._dynamo.mark_static(tensor, dimension)
