"""What a GPU runs as one kernel, compiled here for the CPU: the numbers are the plain functions', whatever the length, which compiles
nothing anew. In a process of its own: megatron.core is imported through the hook."""

import pytest
import torch

from launch.model.fused import fused
from tests.launch.test_gpt import run

COMPILED = """
from unittest import mock
import torch
from launch.megatron import cpu
cpu.install()
from launch.model import layers, loss, rotary
from launch.model.fused import _mark, fused

torch._dynamo.config.disable = False  # the hook compiles nothing
import os
del os.environ["TORCHDYNAMO_DISABLE"]
torch.manual_seed(0)
compiled, compile = [], torch.compile

def kept(function, **options):
    compiled.append(compile(function, **options))
    return compiled[-1]

def compiled_and_plain(function):
    with mock.patch.object(torch, "compile", kept):
        fused(function.__wrapped__)
    mine = compiled.pop()

    def marked(*arguments):
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                _mark(tensor, arguments[0].size(0))
        return mine(*arguments)

    return marked, function.__wrapped__

def calls(length, dtype):
    '''Function, arguments: hidden states of a layer and heads of a product that they are views of, as the model has them.'''
    def some(*shape):
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

all_of_them = (layers._normalised, layers._normalised_backward, rotary._turned, loss._exponentials, loss._gradient)
functions = {f: compiled_and_plain(f) for f in all_of_them}
for dtype, error in ((torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)):
    torch.compiler.set_stance("default")
    for length in (37, 8, 129, 64):
        for function, arguments in calls(length, dtype):
            mine, theirs = (f(*arguments) for f in functions[function])
            pairs = zip(mine, theirs) if isinstance(mine, tuple) else [(mine, theirs)]
            for a, b in pairs:
                assert a.dtype == b.dtype and a.shape == b.shape
                a, b = a.float(), b.float()
                assert (a - b).abs().max() <= error * b.abs().max(), (function.__name__, dtype, length)
        torch.compiler.set_stance("fail_on_recompile")
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert graphs >= 6, "every function was compiled, for both precisions"
print("graphs", graphs)
print("ok")
"""


@pytest.mark.slow
def test_compiled_functions_are_the_plain_ones_at_every_length():
    assert run(COMPILED).strip().endswith("ok")


def test_a_cpu_runs_the_function_as_it_is():
    calls = []

    @fused
    def double(x):
        """Twice as much."""
        calls.append(x)
        return 2 * x

    assert double.__doc__ == "Twice as much."
    x = torch.ones(3)
    assert torch.equal(double(x), 2 * x) and calls[0] is x
