"""The functions that PyTorch compiles for a GPU: right at two lengths, and not compiled again at a third."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from launch.bench.gpu.smoke.outcome import Bench, Outcome, relative
from launch.model import layers, loss, rotary

LIMIT = 1e-2
_LENGTHS = (8192, 6144, 7168)  # PyTorch compiles reductions of up to some 5,000 rows differently


def check_compiled(bench: Bench) -> Iterator[Outcome]:
    """Compare every compiled function with itself uncompiled, in fp32."""
    for name, (function, plain, arguments) in _functions(bench).items():
        worst = 0.0
        for length in _LENGTHS[:2]:
            worst = max(worst, _error(function, plain, arguments(length)))
        before = _graphs()
        worst = max(worst, _error(function, plain, arguments(_LENGTHS[2])))
        compiled = _graphs() - before
        said = f"{worst:.1e}; compiled {compiled} times more at a third length"
        yield Outcome(f"compiled {name}", said, worst < LIMIT and compiled == 0)


def _error(function: Callable[..., Any], plain: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    found, wanted = (
        [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        for out in (function(*arguments), plain(*(_fp32(x) for x in arguments)))
    )
    return max(relative(*pair) for pair in zip(found, wanted, strict=True))


def _fp32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _graphs() -> int:
    """Return how many graphs PyTorch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _functions(
    bench: Bench,
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[int], tuple[Any, ...]]]]:
    """Return {name: (compiled, plain, arguments for a number of tokens)}."""
    from megatron.core.fusions import fused_bias_swiglu as swiglu

    heads, _, d = bench.heads
    hidden, ffn, vocab = (2560, 9728, 151_936) if bench.on_gpu else (64, 128, 512)

    def new(*shape: int, dtype: torch.dtype = bench.dtype) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=dtype)

    def labels(t: int) -> Tensor:
        return torch.randint(-1, vocab, (t,), device=bench.device)

    plain = {
        name: getattr(function, "__wrapped__", function)
        for module in (layers, loss, rotary)
        for name, function in vars(module).items()
    }

    def of_megatron(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        function = getattr(swiglu, name)
        return function, getattr(function, "_torchdynamo_orig_callable", function)

    logits = vocab // 8  # enough for the same code, with less memory
    return {
        "norm": (layers._normalised, plain["_normalised"], lambda t: (new(t, 1, hidden), new(hidden), 1e-6)),
        "norm's backward": (
            layers._normalised_backward, plain["_normalised_backward"],
            lambda t: (new(t, 1, hidden), new(t, 1, hidden), new(hidden), new(t, 1, 1, dtype=torch.float32).abs()),
        ),
        "rotation": (
            rotary._turned, plain["_turned"],
            lambda t: (new(t, heads, d), *(new(t, 1, d // 2, dtype=torch.float32) for _ in range(2))),
        ),
        "loss": (
            loss._exponentials, plain["_exponentials"],
            lambda t: (new(t, logits), new(t, dtype=torch.float32).abs() + 4),
        ),
        "loss's backward": (
            loss._gradient, plain["_gradient"],
            lambda t: (new(t, logits), new(t, dtype=torch.float32).abs() + 10, labels(t) % logits, new(t, dtype=torch.float32)),
        ),
        "Megatron's SwiGLU": (*of_megatron("swiglu"), lambda t: (new(t, 2 * ffn),)),
        "Megatron's SwiGLU, backward": (*of_megatron("swiglu_back"), lambda t: (new(t, ffn), new(t, 2 * ffn))),
    }  # fmt: skip
