"""What a GPU runs as one kernel, compiled for the CPU, beside the plain functions: `python -m tests.launch.compiled` ends well where
the numbers are the same at every length, and no length compiles anything anew."""

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from launch.megatron import cpu

cpu.install()

from launch.model import layers, loss, rotary  # noqa: E402
from launch.model.compiled import _mark, fused  # noqa: E402

Function = Callable[..., Any]
FUNCTIONS: tuple[Any, ...] = (
    layers._normalised,
    layers._normalised_backward,
    rotary._turned,
    loss._exponentials,
    loss._gradient,
)


def compiled(function: Any) -> Function:
    """As a GPU gets it."""
    made, compile_ = [], torch.compile

    def kept(function: Any, **options: Any) -> Any:
        made.append(compile_(function, **options))
        return made[-1]

    with mock.patch.object(torch, "compile", kept):
        fused(function.__wrapped__)

    def marked(*arguments: Any) -> Any:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                _mark(tensor, arguments[0].size(0))
        return made[-1](*arguments)

    return marked


def calls(length: int, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Function, arguments: hidden states of a layer and heads of a product that they are views of, as the model has them."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    product = some(length, 2, 4 * 32)
    for x in (some(length, 1, 96), product[..., :64].reshape(length, -1, 32), product[..., 64:96]):
        weight = some(x.size(-1))
        yield layers._normalised, (x, weight, 1e-6)
        _, scale = layers._normalised(x, weight, 1e-6)
        yield layers._normalised_backward, (some(*x.shape), x, weight, scale)
    angles = rotary.Rotation(torch.rand(length, 1, 12), torch.rand(length, 1, 12))
    for x in (some(length, 4, 32), product[..., 64:96], some(length, 3, 4, 32)[:, 1]):
        yield rotary._turned, (x, *angles)
    for x in (some(length, 4, 24), some(length, 2, 24)):  # all of a head is turned
        yield rotary._turned, (x, *angles)

    logits = some(length, 500)
    yield loss._exponentials, (logits, logits.amax(-1).float())
    column = torch.randint(-1, 500, (length,))
    yield loss._gradient, (logits, logits.float().logsumexp(-1), column, torch.rand(length))


def main() -> None:
    torch._dynamo.config.disable = False  # the hook compiles nothing
    del os.environ["TORCHDYNAMO_DISABLE"]
    torch.manual_seed(0)
    functions = {f: (compiled(f), f.__wrapped__) for f in FUNCTIONS}
    for dtype, error in ((torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)):
        torch.compiler.set_stance("default")
        for length in (37, 8, 129, 64):
            for function, arguments in calls(length, dtype):
                mine, theirs = (f(*arguments) for f in functions[function])
                pairs = zip(mine, theirs, strict=True) if isinstance(mine, tuple) else [(mine, theirs)]
                for a, b in pairs:
                    assert a.dtype == b.dtype and a.shape == b.shape
                    a, b = a.float(), b.float()
                    assert (a - b).abs().max() <= error * b.abs().max(), (function.__name__, dtype, length)
            torch.compiler.set_stance("fail_on_recompile")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 6, "every function was compiled, for both precisions"


if __name__ == "__main__":
    main()
