"""Fusion of several elementwise operations into one GPU kernel. Unfused, each operation would read and write the whole tensor."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# PyTorch falls back to uncompiled code, with other rounding, after this many compilations of one function; its own limit is 8. Norms
# alone take 9: three widths, each for few, for many and for very many tokens.
MOST_VARIANTS = 64


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs compiled if its first tensor is on a GPU. On a CPU it runs uncompiled: compiling takes longer than
    it saves.

    The first dimension of the first tensor (tokens) is dynamic: one compilation serves any number of tokens. All other sizes are
    static, one compilation each, because kernels are faster if they know how many numbers they sum. The function runs without
    gradients, because it serves the passes of an `autograd.Function`: otherwise each combination of tensors that require gradients
    would be compiled anew.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    compiled = torch.compile(function)

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda:
            return function(first, *others)
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in (first, *others)]
        for tensor in arguments:
            if isinstance(tensor, Tensor):
                _mark(tensor, first.size(0))
        with torch.no_grad():
            return compiled(*arguments)

    return call


def _mark(tensor: Tensor, tokens: int) -> None:
    """Tell the compiler which dimensions differ between calls."""
    for dimension, size in enumerate(tensor.shape):
        if dimension == 0 and size == tokens:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # "maybe": a weight may happen to have as many rows
        else:
            torch._dynamo.mark_static(tensor, dimension)
