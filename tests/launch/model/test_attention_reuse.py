"""A function's result is kept from a first pass to a second one, whose gradients are the plain ones; its inputs are not held."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.model.attention_reuse import CachedCall


def attention(query, key, value):
    """[t, heads, d]; key heads are repeated, and scores and weighted values are products of their own."""
    key, value = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key).softmax(-1)
    return torch.einsum("hqk,khd->qhd", scores, value)


def sdpa(query, key, value):
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out[0].transpose(0, 1)


def two_products(first, second, third):
    return (first.flatten(1) @ second.flatten(1).t()).sin() @ third.flatten(1)


def by_segments(query, key, value):
    return torch.cat([sdpa(*parts) for parts in zip(*(x.split([5, 7]) for x in (query, key, value)), strict=True)])


def apart(heads):
    """Three inputs, each in a storage of its own."""
    return [torch.randn(12, n, 8) for n in (4, heads, heads)]


def views(heads):
    """Of which the first is not contiguous and the second begins inside its storage."""
    return [torch.randn(8, 4, 12).permute(2, 1, 0), torch.randn(14, heads, 8)[2:], torch.randn(12, heads, 10)[..., :8]]


def slices(heads):
    """All three in one storage, the first two beginning at the same number."""
    whole = torch.randn(12, 4 + heads, 8)
    return [whole[:, :4], whole[:, :heads], whole[:, 4:]]


def again(inputs):
    """The same numbers in other storages, which are shared as the first ones are; every other number is not a number."""
    storages: dict[int, Tensor] = {}
    out = []
    for x in inputs:
        size = x.untyped_storage().nbytes() // x.element_size()
        storage = storages.setdefault(x.untyped_storage().data_ptr(), torch.full((size,), float("nan")))
        out.append(storage.as_strided(x.size(), x.stride(), x.storage_offset()).copy_(x))
    return out


def plain(function, inputs, gradient):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, gradient)


@pytest.mark.parametrize("make", [apart, views, slices])
@pytest.mark.parametrize(
    ("function", "heads"),
    [(sdpa, 4), (sdpa, 2), (attention, 4), (attention, 2), (by_segments, 2), (two_products, 4)],
)
def test_the_second_pass_has_the_result_and_the_gradients_of_the_plain_function(make, function, heads):
    torch.manual_seed(0)
    inputs = make(heads)
    call, calls = CachedCall(), []

    def counted(*arguments):
        calls.append(1)
        return function(*arguments)

    with torch.no_grad():
        first = call.run(counted, *inputs)
    gradient = torch.randn_like(first)
    wanted, gradients = plain(function, inputs, gradient)
    second_inputs = [x.requires_grad_() for x in again(inputs)]
    call.tensors = [t.clone() for t in call.tensors]  # as when they were elsewhere
    second = call.run(counted, *second_inputs)
    found = torch.autograd.grad(second, second_inputs, gradient)
    assert len(calls) == 1
    assert torch.equal(first, wanted) and torch.equal(second, wanted)
    for mine, other in zip(found, gradients, strict=True):
        assert torch.equal(mine, other)


def test_the_first_pass_holds_no_input():
    inputs = [*apart(2)[:1], *slices(4)[:2]]
    references = [weakref.ref(x.untyped_storage()) for x in inputs] + [weakref.ref(x) for x in inputs]
    held = {x.untyped_storage().data_ptr() for x in inputs}
    call = CachedCall()
    with torch.no_grad():
        call.run(sdpa, *inputs)
    assert not held & {t.untyped_storage().data_ptr() for t in call.tensors}
    del inputs
    gc.collect()
    assert [x() for x in references] == [None] * 6


def test_nothing_is_kept_twice():
    """The exponential is saved as its own result, and as both factors of a product."""

    def function(x):
        e = x.exp()
        return e * e * x

    call, x = CachedCall(), torch.rand(5)
    with torch.no_grad():
        call.run(function, x)
    addresses = [t.data_ptr() for t in call.tensors]
    assert len(addresses) == len(set(addresses)) == 3, "the exponential, its square and the result"
    leaf = x.clone().requires_grad_()
    call.run(function, leaf).sum().backward()
    (wanted,) = plain(function, [x], torch.ones(5))[1]
    assert torch.equal(leaf.grad, wanted)


def test_what_was_kept_is_let_go_of_in_the_backward_pass():
    x, call = torch.rand(5), CachedCall()
    with torch.no_grad():
        call.run(torch.exp, x)
    leaf = x.clone().requires_grad_()
    out = call.run(torch.exp, leaf)
    assert len(call.tensors) == 1
    out.sum().backward()
    assert call.tensors == []
