"""Layers that are computed again, and what they keep on the host, give the gradients of plain training bit for bit, in an order that
a GPU can run."""

import weakref
from unittest import mock

import pytest
import torch

from tests.launch.one_rank import gradients_of, model_of
from tests.launch.streams import Streams
from tests.launch.support import recipe_of

LAYERS, KEPT = 3, 2  # tensors of a layer


def test_what_waits_on_the_host_comes_back_once_and_in_time(megatron, monkeypatch):
    from launch.model.offload_streams import MAX_OVERLAPPING_COPIES
    from launch.model.recompute import HostStore

    offloads = []

    def forward(store, streams, number):
        waiting, x = [], torch.full((4,), float(number))
        for _ in range(LAYERS):
            kept = [x, x * 2]
            out = x + 1  # the layer
            waiting.append((x.tolist(), store.save(kept), weakref.ref(kept[1])))
            offloads.append(waiting[-1][1])
            assert 0 < streams.under_way("out") <= MAX_OVERLAPPING_COPIES * KEPT, "leaves beside the next layer"
            del kept
            x = out
        return waiting

    def backward(store, streams, waiting):
        for layer in reversed(range(LAYERS)):
            wanted, offloaded, left = waiting.pop()
            tensors = store.restore(offloaded)
            assert [t.tolist() for t in tensors] == [wanted, [2 * n for n in wanted]]
            assert left() is None, "what left is not on the GPU any more"
            assert streams.under_way("back") == (KEPT if layer else 0), "the layer before comes beside this one"
            _ = tensors[0] + tensors[1]  # the layer again
            assert offloaded.hosts == [] and offloaded.pending is None and offloaded.previous is None, (
                "the host's memory is free"
            )

    with Streams().at_work(monkeypatch) as streams:
        store = HostStore(streams.copy_streams())
        for number in range(2):
            backward(store, streams, forward(store, streams, number))
        first, second = (forward(store, streams, number) for number in range(2))
        backward(store, streams, first)
        third = forward(store, streams, 2)
        backward(store, streams, second)
        backward(store, streams, third)
    assert not streams.freed_early, streams.freed_early
    for kind in ("out", "back"):
        assert sum(k == kind for k, _ in streams.copies) == 5 * LAYERS * KEPT, "each once"
    assert all(offloaded.pending is None for offloaded in offloads), "nothing is on its way that came before"


LENGTHS = [[60, 41], [100, 3, 30]]


def step(words, batches):
    """Losses and gradients of two micro-batches as a pipeline takes them, and of one more."""
    from launch.model.attention import packed_of
    from launch.model.recompute import RecomputedLayer

    recipe, chunk = model_of(words)

    def run(number):
        packed = packed_of(recipe.model, LENGTHS[number], torch.device("cpu"))
        tokens, labels = batches[number]
        return chunk(tokens, None, None, labels=labels, packed_seq_params=packed)

    alone = run(0)
    again = AssertionError("nothing is to be computed again")
    with mock.patch.object(RecomputedLayer, "run", side_effect=again):
        with torch.no_grad():
            assert torch.equal(run(0), alone), "without gradients"
        chunk.eval()
        assert torch.equal(run(0), alone), "in evaluation"
        chunk.train()
    del alone
    for layer in chunk.decoder.layers:
        assert getattr(layer.self_attention.core_attention, "cached", None) is None
    both = [run(number) for number in (0, 1)]
    for losses in both:
        losses.sum().backward()
    run(1).sum().backward()
    return [x.detach() for x in both], gradients_of(chunk)


@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
def test_a_step_of_layers_computed_again_is_the_plain_one_bit_for_bit(root, megatron, monkeypatch, model):
    from launch.model import recompute as recompute_module

    words = [f"model={model}", "layout.ep=1", "cluster.gpus_per_node=1"]
    words.append(f"model.checkpoint={recipe_of(root, *words)[0].model.checkpoint}")
    torch.manual_seed(0)
    batches = [torch.randint(0, 700, (2, 1, sum(n))) for n in LENGTHS]
    losses, gradients = step(words, batches)
    # Of a host memory in small pieces, so that every tensor lies in several.
    monkeypatch.setattr(recompute_module, "PINNED_PIECE", 1000)
    for recompute in ("linear", "full"):
        for offload in ("false", "true"):
            mine, own = step([*words, f"layout.recompute={recompute}", f"layout.offload={offload}"], batches)
            assert all(map(torch.equal, mine, losses)), (recompute, offload)
            assert own.keys() == gradients.keys() and len(own) > 10
            for name, gradient in gradients.items():
                assert torch.equal(own[name], gradient), (recompute, offload, name)


def test_what_is_offloaded_lies_in_pieces_of_its_memory(megatron, monkeypatch):
    """In the order of the memory, whatever the strides; a tensor with gaps is refused, not spoilt."""
    from launch.model import recompute
    from launch.model.offload_streams import CopyStreams

    monkeypatch.setattr(recompute, "PINNED_PIECE", 40)
    tensors = [torch.rand(5, 7).t(), torch.arange(3), torch.rand(64)[10:21], torch.rand(0)]
    pieces = recompute.pieces_of(tensors)
    assert [p.numel() for p in pieces] == [10, 10, 10, 5, 3, 10, 1, 0]
    store = recompute.HostStore(CopyStreams(torch.device("cpu")))
    wanted = [t.clone() for t in tensors]
    saved = store.save(tensors)
    for t in tensors:
        t.zero_()
    for mine, other, before in zip(store.restore(saved), wanted, tensors, strict=True):
        assert torch.equal(mine, other) and mine.stride() == before.stride()
    with pytest.raises(AssertionError, match="not dense"):
        recompute.pieces_of([torch.rand(4, 4)[:, :2]])
