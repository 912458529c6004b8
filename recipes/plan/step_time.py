"""Predicted time of a step: computation at attained rates, communication on every axis, the pipeline, the optimizer.

Peaks and bandwidths come from `hydra_conf/gpu` and `hydra_conf/cluster`. Allowances are named here. `published.py` compares the
prediction with published measurements. Only three things are assumed to overlap: context parallelism's ring with attention, the
transfers of an offloaded optimizer with its arithmetic, and the transfers of offloaded activations with their own pass.
"""

from dataclasses import dataclass, replace

import numpy as np

from recipes.config import AttentionKernel, EngineName, OptimizerState, Recipe, Recompute
from recipes.dimensions import flops
from recipes.layout import world_size
from recipes.plan.activations import IMBALANCE, activations
from recipes.plan.partition import Buffer, Chunk, Placed, element_size, placed
from recipes.schedule.pipeline import Pipeline

LINK = 0.8  # allowance: share of a link's peak bandwidth that collectives reach
HOST_GB_S = 200.0  # allowance: memory bandwidth of a host in GB/s; it limits an offloaded Adam
OPTIMIZER_BYTES = 30  # bytes read and written per parameter: gradient, fp32 weight, two moments, model weight
ATTENTION_BACKWARD = 2.5  # operations of flash attention's backward pass / those of its forward pass (arXiv 2307.08691)
TOUCHED = 3  # memory traffic of elementwise operations, as a multiple of the activation bytes they save

Parts = dict[str, np.ndarray]  # seconds of each micro-batch, by kind of work


@dataclass(frozen=True)
class Rates:
    """Seconds per token of one stage's forward pass. Tokens are padded and counted before context parallelism.

    `pair` and `pair_backward` are seconds per causal pair of tokens.
    """

    layers: float  # matrix products
    mlps: float  # the share of `layers` that selective recomputation repeats
    head: float  # the output layer
    elementwise: float  # norms, rotation, SwiGLU, additions, softmax
    tensor: float  # collectives of tensor parallelism
    experts: float  # exchange of tokens between experts
    ring: float  # keys and values of context parallelism
    message: float  # messages between pipeline stages
    host: float  # transfer of offloaded activations, in one direction
    pair: float  # attention, forward
    pair_backward: float  # attention, backward


def predictable(r: Recipe) -> bool:
    """Return whether all figures of the machines are known. Nothing is predicted for a CPU."""
    g = r.gpu
    known = (g.bf16_tflops, g.memory_gb_s, g.nvlink_gb_s, g.pcie_gb_s, g.matmul_efficiency, *attention_efficiencies(r))
    return r.cluster.network_gb_s is not None and g.memory_mib is not None and None not in known


def attention_efficiencies(r: Recipe) -> tuple[float | None, float | None]:
    """Return the shares of the peak that the recipe's attention attains, forward and backward; None if not known.

    slime's Transformer Engine takes cuDNN's kernel on Hopper, and FlashAttention-2 on GPUs whose rates by cuDNN are not known here.
    """
    g = r.gpu
    kernel = g.attention if r.engine.name is EngineName.megatron else AttentionKernel.cudnn
    if kernel is AttentionKernel.flash4:
        return g.flash4_efficiency, g.flash4_backward_efficiency
    if kernel is AttentionKernel.cudnn and (g.cudnn_efficiency or r.engine.name is EngineName.megatron):
        return g.cudnn_efficiency, g.cudnn_backward_efficiency
    return g.varlen_efficiency, g.varlen_backward_efficiency


class Clock:
    """Predicted times of one recipe on its cluster. where: the recipe's placement, if known already."""

    def __init__(self, r: Recipe, where: Placed | None = None) -> None:
        self.r, self.world = r, world_size(r)
        self.where = where or placed(r)
        self.rates = {k: self._rates(self.where.stages[k]) for k in self.where.buffers}
        # Work after the last backward pass, on the slowest stage.
        self.after = max(map(self._after, self.where.buffers.values()), key=lambda parts: sum(parts.values()))

    def _link(self, ranks: int, stride: int = 1) -> float:
        """Return the bytes per second of one GPU in one direction, for a group of `ranks` ranks that are `stride` apart."""
        c, g = self.r.cluster, self.r.gpu
        assert c.network_gb_s is not None and g.nvlink_gb_s is not None, "predictable"
        return LINK * 1e9 * (g.nvlink_gb_s if ranks * stride <= c.gpus_per_node else c.network_gb_s)

    def _rates(self, chunks: list[Chunk]) -> Rates:
        m, p, g = self.r.model, self.r.layout, self.r.gpu
        assert g.bf16_tflops and g.memory_gb_s and g.pcie_gb_s and g.matmul_efficiency, "predictable"
        forward, backward = attention_efficiencies(self.r)
        assert forward and backward, "predictable"
        dense, moe = sum(c.dense for c in chunks), sum(c.moe for c in chunks)
        layers, output = dense + moe, chunks[-1].output
        operations = g.bf16_tflops * 1e12 * p.tp * p.cp
        product, memory = 1 / (operations * g.matmul_efficiency), 1 / (g.memory_gb_s * 1e9)
        # Operations per token; a multiply and an add count as two.
        projections = 4 * m.hidden * m.head_dim * (m.heads + m.kv_heads)
        routed = 6 * m.hidden * m.expert_ffn * (m.top_k * IMBALANCE + m.shared_experts) + 2 * m.experts * m.hidden
        mlps = dense * 6 * m.hidden * m.ffn + moe * routed
        pair = flops(m).a_pair / m.layers * layers / operations
        saved = activations(replace(self.r, layout=replace(p, recompute=Recompute.none)))
        touched = TOUCHED * (layers * saved.attention + dense * saved.mlp + moe * saved.moe) / p.cp
        logits = TOUCHED * 4 * m.vocab / (p.tp * p.cp) if output else 0.0
        # Bytes per token. Attention and MLP each gather their input and scatter their output. Routed experts exchange tokens.
        row = m.hidden * element_size(self.r) / p.cp
        exchanged = 2 * m.top_k * row * p.etp / p.tp * (1 - 1 / (p.ep * p.etp))
        keys = 2 * m.kv_heads * m.head_dim * element_size(self.r) / (p.tp * p.cp)
        away = layers * saved.saved_per_layer(p.recompute) / p.cp if p.offload else 0.0
        sent = p.vpp * row / (p.tp if p.sp else 1)
        return Rates(
            layers=(layers * projections + mlps) * product,
            mlps=mlps * product,
            head=2 * m.vocab * m.hidden * product if output else 0.0,
            elementwise=(touched + logits) * memory,
            tensor=(4 * dense + (4 if m.shared_experts else 2) * moe) * row * (1 - 1 / p.tp) / self._link(p.tp),
            experts=moe * exchanged / self._link(p.ep * p.etp),
            ring=layers * (p.cp - 1) * keys / self._link(p.cp, p.tp),
            message=sent / self._link(p.pp, self.world // p.pp) if p.pp > 1 else 0.0,
            host=away / (LINK * g.pcie_gb_s * 1e9),
            pair=pair / forward,
            pair_backward=ATTENTION_BACKWARD * pair / backward,
        )

    def _after(self, held: list[Buffer]) -> dict[str, float]:
        """Return the seconds after the last backward pass: gradient reduction, weight gathering and the optimizer's update."""
        r, p = self.r, self.r.layout
        assert r.gpu.memory_gb_s and r.gpu.pcie_gb_s, "predictable"
        strides = (p.tp, p.ep * p.etp)
        reduced = sum(
            (4 + element_size(r)) * b.elements * (1 - 1 / b.ranks) / self._link(b.ranks, stride)
            for b, stride in zip(held, strides, strict=True)
        )
        parameters = sum(b.parameters / b.ranks for b in held)
        update = OPTIMIZER_BYTES * parameters / (r.gpu.memory_gb_s * 1e9)
        if p.optimizer_state is OptimizerState.offloaded:
            # The embedded engine moves its states (12 bytes) to the GPU and back at the same time; slime updates them on the host.
            embedded = r.engine.name is EngineName.megatron
            host = (24 if embedded else OPTIMIZER_BYTES) * parameters * r.cluster.gpus_per_node / (HOST_GB_S * 1e9)
            update = max(host, (12 if embedded else 4) * parameters / (LINK * r.gpu.pcie_gb_s * 1e9))
        return {"gradient reduction": reduced, "optimizer": update}

    def passes(self, stage: int, tokens: np.ndarray, pairs: np.ndarray) -> tuple[Parts, Parts]:
        """Return {kind of work: (forward, backward)}: the seconds that each micro-batch takes on one stage.

        tokens, pairs: padded tokens and causal pairs of each micro-batch.
        """
        a, recompute = self.rates[self.where.kind[stage]], self.r.layout.recompute
        again = {Recompute.none: 0.0, Recompute.selective: 0.5, Recompute.linear: 1.0, Recompute.full: 1.0}[recompute]
        attention, back = a.pair * pairs, a.pair_backward * pairs
        ring = np.maximum(0.0, a.ring * tokens - attention)
        repeated = {
            Recompute.none: 0.0 * tokens,
            Recompute.selective: a.mlps * tokens,
            Recompute.linear: a.layers * tokens,
            Recompute.full: a.layers * tokens + attention,
        }
        forward = {
            "matrix products": (a.layers + a.head) * tokens,
            "attention": attention,
            "recomputation": 0.0 * tokens,
            "element by element": a.elementwise * tokens,
            "tensor parallel": a.tensor * tokens,
            "context parallel": ring,
            "expert parallel": a.experts * tokens,
            "pipeline messages": a.message * tokens,
        }
        backward = {
            "matrix products": 2 * (a.layers + a.head) * tokens,
            "attention": back,
            "recomputation": repeated[recompute],
            "element by element": (2 + again) * a.elementwise * tokens,
            # Sequence parallelism gathers the inputs a second time for the weights' gradients.
            "tensor parallel": (1.5 + again) * a.tensor * tokens,
            "context parallel": np.maximum(0.0, 2 * a.ring * tokens - back) + (recompute is Recompute.full) * ring,
            "expert parallel": (1 + (again > 0)) * a.experts * tokens,
            "pipeline messages": a.message * tokens,
        }
        for one in (forward, backward):
            one["waiting for the host"] = np.maximum(0.0, a.host * tokens - np.add.reduce([*one.values()]))
        return forward, backward

    def step(self, tokens: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
        """Return the seconds of a step by part, for the busiest stage of the slowest rank. `bubbles` is its idle time.

        tokens, pairs: [ranks, micro-batches] padded tokens and causal pairs.
        """
        forward, backward = self.times(tokens, pairs)
        ends = self.pipeline.makespan(forward, backward)
        rank = int(ends.argmax())
        stage = int((forward + backward)[:, rank].sum(axis=1).argmax())
        down, up = self.passes(stage, tokens, pairs)
        parts = {name: float((down[name] + up[name])[rank].sum()) for name in down}
        return parts | {"bubbles": max(0.0, float(ends[rank]) - sum(parts.values()))} | self.after

    def times(self, tokens: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the (forward, backward) seconds of every pass, each [stages, ranks, micro-batches]."""
        found = [self.passes(s, tokens, pairs) for s in range(self.r.layout.pp)]
        forward, backward = (np.stack([np.add.reduce([*one[i].values()]) for one in found]) for i in (0, 1))
        return self._together(forward), self._together(backward)

    def _together(self, times: np.ndarray) -> np.ndarray:
        """Raise the times [stages, ranks, micro-batches] to those of the slowest rank in each expert-parallel group.

        Data-parallel ranks that exchange tokens between experts wait for the slowest of them in every micro-batch.
        """
        p = self.r.layout
        _, ranks, batches = times.shape
        spanned = -(-p.ep * p.etp // (p.tp * p.cp))
        groups = ranks // spanned if spanned and ranks % spanned == 0 else 1
        slowest = times.reshape(p.pp, groups, -1, batches).max(axis=2, keepdims=True)
        return np.broadcast_to(slowest, (p.pp, groups, ranks // groups, batches)).reshape(times.shape)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline with the layout's stages and chunks."""
        return Pipeline(self.r.layout.pp, chunks=self.r.layout.vpp)
