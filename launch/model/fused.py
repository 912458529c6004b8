"""Several operations on a tensor as one kernel on a GPU, where each of them alone would read and write all of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where its first tensor is on a GPU; on a CPU, where compiling takes longer than it saves, as it is.

    dynamic: micro-batches differ in length, and each new one would compile it anew.
    """
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(first: torch.Tensor, *others: Any) -> Any:
        return (compiled if first.is_cuda else function)(first, *others)

    return call
