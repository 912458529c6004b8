"""Memory of a run: on a GPU, pipeline stage by stage and part by part; on a node's host; on the disk.

Weights, gradients and optimizer state are exact, activations are measured to within 5% (tables in `recipes/README.md`). The
rest are allowances, named below, which nothing here has measured on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import psutil

from recipes.config import Dtype, EngineName, OptimizerState, Recipe, Recompute
from recipes.dimensions import parameters
from recipes.plan.activations import IMBALANCE, Activations, activations
from recipes.plan.partition import Buffer, Chunk, Placed, element_size, placed
from recipes.schedule.pipeline import in_flight

RUNTIME = 3 * 2**30  # allowance: CUDA context, NCCL's communicators, cuBLAS and cuDNN workspaces
RUNTIME_CPU = 400 * 10**6  # of a rank on a CPU: Python and its imports (megatron.md: 0.4 GB a rank)
UNDER_WAY = 2  # layers whose tensors are on the GPU while they come or leave (`launch/model/offload_streams.py`)
PINNED = 4 / 3  # allowance: what rounding up each parameter's states to powers of two adds
FRAGMENTATION = 0.1  # allowance: of what comes and goes, with expandable segments
FITS, RISKY = 0.8, 0.95  # arXiv 2411.06465: of 454 runs below 80% of the memory none ran out of it


class Verdict(Enum):
    fits = "fits"
    risky = "risky"
    does_not_fit = "does not fit"


@dataclass(frozen=True)
class Load:
    """Padded tokens of the micro-batches that each rank runs in turn in one step, before context parallelism cuts them."""

    ranks: Sequence[Sequence[int]]

    @property
    def largest(self) -> int:
        return max(max(rank) for rank in self.ranks)

    @property
    def batches(self) -> int:
        return len(self.ranks[0])

    def window(self, count: int) -> int:
        """Most tokens in `count` consecutive micro-batches."""
        return max(sum(rank[i : i + count]) for rank in self.ranks for i in range(max(1, len(rank) - count + 1)))


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest rank of one pipeline stage. `loss` is gone before `working` is taken: the larger counts."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float  # a layer computed again, and the gradients inside it
    loss: float  # logits and their gradient
    communication: float
    fragmentation: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - min(self.working, self.loss)

    @property
    def allocated(self) -> float:
        """Of tensors alone: what PyTorch's `max_memory_allocated` counts."""
        return self.total - self.fragmentation - self.runtime


def gpu_memory(r: Recipe, load: Load, where: Placed | None = None) -> list[StageMemory]:
    """Of every pipeline stage under this load; `IMBALANCE` more tokens than the mean at the busiest rank's experts. where: of
    this recipe, if it is known already."""
    a, where = activations(r), where or placed(r)
    return [_stage(r, where.stages[k], a, load, where.buffers[k], number) for number, k in enumerate(where.kind)]


def _stage(r: Recipe, chunks: list[Chunk], a: Activations, load: Load, held: list[Buffer], number: int) -> StageMemory:
    m, p = r.model, r.layout
    size = element_size(r)
    elements = sum(b.elements for b in held)
    largest = load.largest / p.cp
    waiting = [a.waiting(p.recompute) * max(0, c.layers - UNDER_WAY) if p.offload else 0.0 for c in chunks]
    kept = max(a.chunk(c, p.recompute) - away for c, away in zip(chunks, waiting, strict=True))
    # Interleaved, a stage holds so many chunks' activations, of about as many micro-batches.
    passes = in_flight(p.pp, load.batches, p.vpp, number)
    activation = kept * load.window(passes) / p.cp if p.vpp == 1 else kept * passes * load.window(p.pp) / p.pp / p.cp
    working = largest * max(a.again(c, p.recompute) + a.gradients(c) for c in chunks)
    # The output layer's gradient waits for the embedding's, which comes last.
    if m.tied and p.pp == 1 and r.engine.name is EngineName.megatron:
        working += size * m.vocab / p.tp * m.hidden
    loss = _loss(r, a, largest) if chunks[-1].output else 0.0
    # Gathered tokens of sequence parallelism, forward and backward; tokens on their way to experts and back.
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
    """Bytes of the output layer's product and the loss, forward and backward, for so many tokens of a rank."""
    p, size, vocab = r.layout, element_size(r), r.model.vocab / r.layout.tp
    if p.loss_chunk and r.engine.name is EngineName.megatron:
        unfused = 0 if r.gpu.memory_mib else 12  # fp32 numbers between that a GPU never writes
        logits, weight = min(p.loss_chunk, tokens) * vocab, vocab * r.model.hidden
        # One chunk's logits and their gradient, then that and its part of the weight's; the weight's in fp32; that of the tokens.
        chunk = max(logits * (2 * size + unfused), (logits + weight) * size)
        return chunk + weight * 4 + tokens * (a.softmax + r.model.hidden * size)
    # fp32 logits, their gradient, and that in the model's precision.
    whole = tokens * ((8 + size) * vocab + a.softmax)
    return whole + (2 * 4 * min(p.loss_chunk, tokens) * vocab if p.loss_chunk else 0.0)


def optimizer_bytes(r: Recipe) -> int:
    """Of one parameter's state on the GPU: two moments, and fp32 weights, of which a precision-aware optimizer keeps the 16
    bits that the bf16 weights lack (megatron-core 0.16.1, `store_param_remainders`)."""
    if r.layout.optimizer_state is OptimizerState.offloaded:
        return 0
    if r.engine.dtype is Dtype.fp32:
        return 8
    return 10 if r.layout.optimizer_state is OptimizerState.precision_aware else 12


def _optimizer_elements(held: list[Buffer]) -> float:
    return sum(b.parameters / b.ranks for b in held)


def memory_limit(r: Recipe) -> int:
    """Bytes of a GPU; on a machine without, of a rank's share of its memory."""
    if r.gpu.memory_mib is None:
        return int(psutil.virtual_memory().total) // r.cluster.gpus_per_node
    return r.gpu.memory_mib * 2**20


def verdict(used: float, limit: float) -> Verdict:
    share = used / limit
    return Verdict.fits if share < FITS else Verdict.risky if share < RISKY else Verdict.does_not_fit


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the fullest node."""

    optimizer: float  # offloaded: fp32 weights and two moments, and slime's pinned gradients
    activations: float  # offloaded: what the layers of a node's ranks keep
    weights_copy: float  # slime's, pinned (slime 624b824, `actor.py:121-130`)
    object_store: float  # Ray's: a step's sequences
    processes: float  # allowance: 5 GB a rank

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def host_memory(r: Recipe, load: Load, step_tokens: int, where: Placed | None = None) -> HostMemory:
    """step_tokens: of the largest step. Ranks of a node are taken to be of the fullest pipeline stage."""
    where = where or placed(r)
    stage_buffers = where.buffers.values()
    ranks = r.cluster.gpus_per_node
    slime = r.engine.name is EngineName.slime
    offloaded = r.layout.optimizer_state is OptimizerState.offloaded
    return HostMemory(
        # slime's: HybridDeviceOptimizer (megatron-core 0.16.1, `optimizer/cpu_offloading`), with gradients.
        optimizer=(16 if slime else 12 * PINNED) * ranks * max(map(_optimizer_elements, stage_buffers))
        if offloaded
        else 0.0,
        activations=ranks * _waiting_on_host(r, load, where) if r.layout.offload else 0.0,
        weights_copy=2 * ranks * max(sum(b.elements for b in held) for held in stage_buffers) if slime else 0.0,
        # Pickled lists of tokens (5 bytes) and masks (2), whole and again split over the ranks.
        object_store=14 * step_tokens if slime else 0.0,
        processes=ranks * (5e9 if r.gpu.memory_mib else RUNTIME_CPU),
    )


def _waiting_on_host(r: Recipe, load: Load, where: Placed) -> float:
    """Of a rank of the fullest stage, in whose passes under way every layer keeps its tensors here."""
    p, tokens = r.layout, load.largest / r.layout.cp
    fullest = max(
        in_flight(p.pp, load.batches, p.vpp, number) * max(c.layers for c in where.stages[kind])
        for number, kind in enumerate(where.kind)
    )
    heads, size = r.model.heads / p.tp, element_size(r)
    each = [r.model.hidden * size / (p.tp if p.sp else 1)]
    each += [heads * r.model.head_dim * size, heads * 4] if p.recompute is Recompute.linear else []
    return fullest * sum(2.0 ** math.ceil(math.log2(tokens * one)) for one in each)  # as PyTorch rounds pinned memory


@dataclass(frozen=True)
class Disk:
    """Bytes of one save, and seconds that writing them takes where the disk's speed is known."""

    checkpoint: float  # weights, fp32 weights and two moments
    export: float  # the Hugging Face folder, with untrained layers that are copied
    seconds: float | None


def disk(r: Recipe) -> Disk:
    p = parameters(r.model)
    size = element_size(r)
    checkpoint = p.total * (size + 12)
    export = (p.total + p.mtp) * size
    speed = r.cluster.disk_gb_s
    return Disk(checkpoint, export, (checkpoint + export) / (speed * 1e9) if speed else None)
