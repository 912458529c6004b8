"""The part of a model on one rank: its pipeline stage's layers, and its parameters in the distributed optimizer's buffers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.config import Dtype, Layout, Model, Recipe
from recipes.layout import round_up, stage_layers, world_size

Tensors = tuple[int, int]  # elements of one tensor on this rank, number of such tensors


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of one pipeline stage; a stage has `layout.vpp` of them."""

    dense: int  # layers without experts
    moe: int  # layers with experts
    embedding: bool  # whether it is the first chunk of the model
    output: bool  # whether it is the last chunk of the model

    @property
    def layers(self) -> int:
        return self.dense + self.moe


def element_size(r: Recipe) -> int:
    """Return the bytes of one weight in the training precision."""
    return 2 if r.engine.dtype is Dtype.bf16 else 4


def stages(m: Model, p: Layout) -> list[list[Chunk]]:
    """Return the chunks of every pipeline stage. The layout must be legal."""
    dense_layers = m.dense_layers if m.experts else m.layers
    return [
        [
            Chunk(
                dense=(dense := max(0, min(c.stop, dense_layers) - c.start)),
                moe=len(c) - dense,
                embedding=c.start == 0,
                output=c.stop == m.layers,
            )
            for c in chunks
        ]
        for chunks in stage_layers(m, p)
    ]


@dataclass(frozen=True)
class Buffer:
    """A rank's contiguous buffer of weights. The gradients have a buffer of the same size."""

    parameters: int  # elements without padding
    elements: int  # elements with padding
    ranks: int  # ranks that shard the optimizer state of these parameters


@dataclass(frozen=True)
class Placed:
    """Placement of a model on pipeline stages. Stages with equal chunks share one set of buffers."""

    stages: list[list[Chunk]]
    kind: list[int]  # for every stage, the number of the first stage that is equal to it
    buffers: dict[int, list[Buffer]]  # by the numbers in `kind`


def placed(r: Recipe) -> Placed:
    """Return the placement of the recipe's model. The layout must be legal."""
    all_stages = stages(r.model, r.layout)
    kind = [all_stages.index(chunks) for chunks in all_stages]
    world = world_size(r)
    return Placed(all_stages, kind, {k: buffers(r.model, r.layout, all_stages[k], world) for k in {*kind}})


def buffers(m: Model, p: Layout, chunks: list[Chunk], world: int) -> list[Buffer]:
    """Return the two buffers of one pipeline stage: replicated parameters, and routed experts reduced over their own ranks.

    The sizes follow megatron-core 0.16.1 (`distributed/param_and_grad_buffer.py`): every parameter begins at a multiple of
    64, every bucket ends at a multiple of lcm(ranks, 128), and an embedding shared by two stages has its own bucket.
    """
    shared_ranks = world // (p.tp * p.pp)
    expert_ranks = world // (p.ep * p.etp * p.pp)
    buckets: list[list[Tensors]] = []
    routed: list[list[Tensors]] = []
    for chunk in chunks:
        plain, experts = list(_plain(m, p, chunk)), list(_routed(m, p, chunk))
        # Experts that the same ranks hold as all other parameters are reduced together with them.
        apart = p.ep > 1 or p.etp != p.tp
        buckets.append(plain if apart else plain + experts)
        routed.append(experts if apart else [])
        if m.tied and p.pp > 1 and (chunk.embedding or chunk.output):
            buckets.append([(m.vocab // p.tp * m.hidden, 1)])
    return [_buffer(buckets, shared_ranks), _buffer(routed, expert_ranks)]


def _buffer(buckets: list[list[Tensors]], ranks: int) -> Buffer:
    ends = math.lcm(ranks, 128)
    return Buffer(
        parameters=sum(count * elements for bucket in buckets for elements, count in bucket),
        elements=sum(round_up(sum(count * round_up(n, 64) for n, count in bucket), ends) for bucket in buckets),
        ranks=ranks,
    )


def _plain(m: Model, p: Layout, chunk: Chunk) -> Iterator[Tensors]:
    """Yield the tensors of a chunk except those of the routed experts."""
    heads = m.heads + 2 * m.kv_heads
    layers = chunk.layers
    yield m.hidden * heads * m.head_dim // p.tp, layers  # queries, keys and values
    yield m.hidden * m.heads * m.head_dim // p.tp, layers  # projection
    yield m.hidden, 2 * layers  # norms
    if m.qkv_bias:
        yield heads * m.head_dim // p.tp, layers
    if m.qk_norm:
        yield m.head_dim, 2 * layers
    yield 2 * m.hidden * m.ffn // p.tp, chunk.dense
    yield m.hidden * m.ffn // p.tp, chunk.dense
    yield m.experts * m.hidden, chunk.moe  # router
    if m.shared_experts:
        yield 2 * m.hidden * m.shared_experts * m.expert_ffn // p.tp, chunk.moe
        yield m.hidden * m.shared_experts * m.expert_ffn // p.tp, chunk.moe
    if chunk.output:
        yield m.hidden, 1  # final norm
    split = m.tied and p.pp > 1  # then counted in its own bucket
    if chunk.embedding and not split:
        yield m.vocab // p.tp * m.hidden, 1
    if chunk.output and not m.tied:
        yield m.vocab // p.tp * m.hidden, 1


def _routed(m: Model, p: Layout, chunk: Chunk) -> Iterator[Tensors]:
    """Yield the tensors of a chunk's routed experts."""
    here = m.experts // p.ep * chunk.moe
    yield 2 * m.hidden * m.expert_ffn // p.etp, here
    yield m.hidden * m.expert_ffn // p.etp, here
