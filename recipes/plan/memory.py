"""Predicted memory of a run: of each GPU by pipeline stage and part, and of a node's host.

Weights, gradients, optimizer state and activations equal what was measured on real ranks (tables in
`recipes/plan/README.md`). All other parts are allowances, named below. They were not measured on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import psutil

from recipes.config import Dtype, EngineName, OptimizerState, Recipe, Recompute
from recipes.plan.activations import IMBALANCE, Activations, activations
from recipes.plan.partition import Buffer, Chunk, Placed, element_size, placed
from recipes.schedule.pipeline import in_flight

RUNTIME = 3 * 2**30  # bytes, allowance: CUDA context, NCCL communicators, cuBLAS and cuDNN workspaces
RUNTIME_CPU = 400 * 10**6  # bytes of a rank on a CPU: Python and its imports (megatron.md: 0.4 GB per rank)
COPYING_LAYERS = 2  # layers whose offloaded tensors are on the GPU during a copy (`launch/model/offload_streams.py`)
# Bytes of a piece of offloaded activations. PyTorch rounds pinned memory up to powers of two: a tensor of 1.2 GB would take 2 GiB.
PINNED_PIECE = 2**26
PINNED_ROUNDING = 4 / 3  # allowance: factor for rounding each parameter's pinned states up to powers of two
FRAGMENTATION = 0.1  # allowance: share of the temporary memory, with expandable segments
FITS, RISKY = 0.8, 0.95  # shares of the memory; arXiv 2411.06465: none of 454 runs below 80% ran out of memory


class Verdict(Enum):
    """Whether a plan fits: its share of the memory is below `FITS`, below `RISKY`, or larger."""

    fits = "fits"
    risky = "risky"
    does_not_fit = "does not fit"


@dataclass(frozen=True)
class Load:
    """Padded tokens of each rank's micro-batches in one step, in running order, before context parallelism splits them."""

    ranks: Sequence[Sequence[int]]

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return max(max(rank) for rank in self.ranks)

    @property
    def batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.ranks[0])

    def window(self, count: int) -> int:
        """Return the most tokens in `count` consecutive micro-batches of a rank."""
        return max(sum(rank[i : i + count]) for rank in self.ranks for i in range(max(1, len(rank) - count + 1)))


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of one pipeline stage.

    `loss` is freed before `working` is allocated, so the total counts only the larger of the two.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float  # one recomputed layer and the gradients inside it
    loss: float  # logits and their gradients
    communication: float
    fragmentation: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - min(self.working, self.loss)

    @property
    def allocated(self) -> float:
        """Bytes of tensors alone, as PyTorch's `max_memory_allocated` counts them."""
        return self.total - self.fragmentation - self.runtime


def gpu_memory(r: Recipe, load: Load, where: Placed | None = None) -> list[StageMemory]:
    """Return the memory of every pipeline stage under this load.

    The busiest rank's experts get `IMBALANCE` times the mean number of tokens. where: the recipe's placement, if known already.
    """
    a, where = activations(r), where or placed(r)
    return [_stage(r, where.stages[k], a, load, where.buffers[k], number) for number, k in enumerate(where.kind)]


def _stage(r: Recipe, chunks: list[Chunk], a: Activations, load: Load, held: list[Buffer], number: int) -> StageMemory:
    m, p = r.model, r.layout
    size = element_size(r)
    elements = sum(b.elements for b in held)
    largest = load.largest / p.cp
    offloaded = [
        a.saved_per_layer(p.recompute) * max(0, c.layers - COPYING_LAYERS) if p.offload else 0.0 for c in chunks
    ]
    saved = max(a.chunk(c, p.recompute) - away for c, away in zip(chunks, offloaded, strict=True))
    # An interleaved stage holds the activations of `passes` chunks, of about as many micro-batches.
    passes = in_flight(p.pp, load.batches, p.vpp, number)
    activation = saved * load.window(passes) / p.cp if p.vpp == 1 else saved * passes * load.window(p.pp) / p.pp / p.cp
    working = largest * max(a.recomputed(c, p.recompute) + a.gradients(c) for c in chunks)
    # The output layer's gradient stays until the embedding's gradient, the last one, is ready.
    if m.tied and p.pp == 1 and r.engine.name is EngineName.megatron:
        working += size * m.vocab / p.tp * m.hidden
    loss = _loss(r, a, largest) if chunks[-1].output else 0.0
    # Tokens gathered by sequence parallelism, forward and backward; tokens sent to the experts and back; pipeline messages.
    cut = 1 / p.tp if p.sp else 1.0
    dispatched = 2 * cut * m.top_k * IMBALANCE if m.experts else 0.0
    communication = largest * m.hidden * size * ((2 if p.sp else 0) + dispatched + (2 * cut if p.pp > 1 else 0))
    return StageMemory(
        weights=size * elements,
        gradients=4 * elements,
        optimizer=optimizer_bytes(r) * _optimizer_elements(held),
        activations=activation,
        working=working,
        loss=loss,
        communication=communication,
        fragmentation=FRAGMENTATION * (activation + max(working, loss) + communication),
        runtime=RUNTIME if r.gpu.memory_mib else RUNTIME_CPU,
    )


def _loss(r: Recipe, a: Activations, tokens: float) -> float:
    """Return the bytes of the output layer's product and of the loss, forward and backward. tokens: of one rank."""
    p, size, vocab = r.layout, element_size(r), r.model.vocab / r.layout.tp
    if p.loss_chunk and r.engine.name is EngineName.megatron:
        unfused = 0 if r.gpu.memory_mib else 12  # bytes of fp32 intermediates; a GPU's fused kernel never writes them
        logits, weight = min(p.loss_chunk, tokens) * vocab, vocab * r.model.hidden
        # Larger of: a chunk's logits and their gradient; that gradient and its part of the weight's gradient. Then the fp32
        # weight gradient and the tokens' gradient.
        chunk = max(logits * (2 * size + unfused), (logits + weight) * size)
        return chunk + weight * 4 + tokens * (a.softmax + r.model.hidden * size)
    # fp32 logits, their fp32 gradient, and the gradient in the model's precision.
    whole = tokens * ((8 + size) * vocab + a.softmax)
    return whole + (2 * 4 * min(p.loss_chunk, tokens) * vocab if p.loss_chunk else 0.0)


def optimizer_bytes(r: Recipe) -> int:
    """Return the bytes of one parameter's optimizer state on the GPU: two fp32 moments and the fp32 weight.

    A precision-aware optimizer stores only the 16 bits of the fp32 weight that the bf16 weight lacks (megatron-core 0.16.1,
    `store_param_remainders`).
    """
    if r.layout.optimizer_state is OptimizerState.offloaded:
        return 0
    if r.engine.dtype is Dtype.fp32:
        return 8
    return 10 if r.layout.optimizer_state is OptimizerState.precision_aware else 12


def _optimizer_elements(held: list[Buffer]) -> float:
    return sum(b.parameters / b.ranks for b in held)


def memory_limit(r: Recipe) -> int:
    """Return the memory limit of a rank in bytes: a GPU's memory, or without GPUs an equal share of the machine's memory."""
    if r.gpu.memory_mib is None:
        return int(psutil.virtual_memory().total) // r.cluster.gpus_per_node
    return r.gpu.memory_mib * 2**20


def verdict(used: float, limit: float) -> Verdict:
    """Return the verdict on `used` of `limit`, both in the same unit."""
    share = used / limit
    return Verdict.fits if share < FITS else Verdict.risky if share < RISKY else Verdict.does_not_fit


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest node."""

    optimizer: float  # if offloaded: fp32 weights and two moments; with slime also pinned gradients
    activations: float  # if offloaded: saved activations of all ranks of the node
    weights_copy: float  # slime's pinned copy (slime 624b824, `actor.py:121-130`)
    object_store: float  # the sequences of a step in Ray's object store
    processes: float  # allowance: 5 GB per rank

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def host_memory(r: Recipe, load: Load, step_tokens: int, where: Placed | None = None) -> HostMemory:
    """Return the memory of one host, assuming that all its ranks belong to the fullest pipeline stage.

    step_tokens: tokens of the largest step.
    """
    where = where or placed(r)
    stage_buffers = where.buffers.values()
    ranks = r.cluster.gpus_per_node
    slime = r.engine.name is EngineName.slime
    offloaded = r.layout.optimizer_state is OptimizerState.offloaded
    return HostMemory(
        # slime uses HybridDeviceOptimizer (megatron-core 0.16.1, `optimizer/cpu_offloading`), which also holds the gradients.
        optimizer=(16 if slime else 12 * PINNED_ROUNDING) * ranks * max(map(_optimizer_elements, stage_buffers))
        if offloaded
        else 0.0,
        activations=ranks * _offloaded_activations(r, load, where) if r.layout.offload else 0.0,
        weights_copy=2 * ranks * max(sum(b.elements for b in held) for held in stage_buffers) if slime else 0.0,
        # Pickled lists of tokens (5 bytes) and masks (2 bytes): once whole and once split over the ranks.
        object_store=14 * step_tokens if slime else 0.0,
        processes=ranks * (5e9 if r.gpu.memory_mib else RUNTIME_CPU),
    )


def _offloaded_activations(r: Recipe, load: Load, where: Placed) -> float:
    """Return the host bytes of one rank on the fullest pipeline stage: offloaded activations of all in-flight micro-batches."""
    p, tokens = r.layout, load.largest / r.layout.cp
    fullest = max(
        in_flight(p.pp, load.batches, p.vpp, number) * max(c.layers for c in where.stages[kind])
        for number, kind in enumerate(where.kind)
    )
    heads, size = r.model.heads / p.tp, element_size(r)
    each = [r.model.hidden * size / (p.tp if p.sp else 1)]
    each += [heads * r.model.head_dim * size, heads * 4] if p.recompute is Recompute.linear else []
    return fullest * sum(_in_pieces(tokens * one) for one in each)


def _in_pieces(size: float) -> float:
    """Return the pinned bytes of a tensor that is offloaded in pieces; the last one is rounded up to a power of two."""
    last = size % PINNED_PIECE
    return size - last + (2.0 ** math.ceil(math.log2(last)) if last else 0.0)
