"""How long a step takes: computation at attained rates, communication on every axis, the pipeline, the optimizer.

Peaks and bandwidths come from `hydra_conf/gpu` and `hydra_conf/cluster`, allowances are named here, and `published.py` compares
the whole with what others have measured. Nothing is taken to overlap but context parallelism's ring with attention, and an
offloaded optimizer's transfers with its arithmetic, and offloaded activations' with the pass that they are of.
"""

from dataclasses import dataclass, replace

import numpy as np

from recipes.config import EngineName, OptimizerState, Recipe, Recompute
from recipes.dimensions import flops
from recipes.layout import world_size
from recipes.plan.activations import IMBALANCE, activations
from recipes.plan.partition import Buffer, Chunk, Placed, element_size, placed
from recipes.schedule.pipeline import Pipeline

LINK = 0.8  # allowance: share of a link's peak that collectives of this size reach
HOST_GB_S = 200.0  # allowance: memory bandwidth of a node's host, which bounds an offloaded Adam
OPTIMIZER_BYTES = 30  # read and written for a parameter: gradient, fp32 weight, two moments, weight
ATTENTION_BACKWARD = 2.5  # flash attention's backward products over its forward ones (arXiv 2307.08691)
TOUCHED = 3  # times that norms, rotation, SwiGLU and additions move what they keep for the backward pass

Parts = dict[str, np.ndarray]  # seconds of each micro-batch, by what they are spent on


@dataclass(frozen=True)
class Rates:
    """Seconds a token (padded, before context parallelism) of one stage's forward pass; the last two a causal pair."""

    layers: float  # matrix products
    mlps: float  # of `layers`, those that selective recomputation repeats
    head: float  # the output layer
    elementwise: float
    tensor: float
    experts: float
    ring: float
    message: float
    host: float  # what is offloaded, one way
    pair: float
    pair_backward: float


def predictable(r: Recipe) -> bool:
    """Whether all figures of the machines are known; nothing is predicted for a CPU."""
    g, known = r.gpu, (r.cluster.network_gb_s, *(v for k, v in vars(r.gpu).items() if k not in ("name", "hour_price")))
    return g.bf16_tflops is not None and None not in known


class Clock:
    """Times of one recipe on its cluster."""

    def __init__(self, r: Recipe, where: Placed | None = None) -> None:
        self.r, self.world = r, world_size(r)
        self.where = where or placed(r)
        self.rates = {k: self._rates(self.where.stages[k]) for k in self.where.buffers}
        # After the last backward pass, of the slowest stage.
        self.after = max(map(self._after, self.where.buffers.values()), key=lambda parts: sum(parts.values()))

    def _link(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second of one GPU, in one direction, in a group of so many ranks of which every `stride`-th."""
        c, g = self.r.cluster, self.r.gpu
        assert c.network_gb_s is not None and g.nvlink_gb_s is not None, "predictable"
        return LINK * 1e9 * (g.nvlink_gb_s if ranks * stride <= c.gpus_per_node else c.network_gb_s)

    def _rates(self, chunks: list[Chunk]) -> Rates:
        m, p, g = self.r.model, self.r.layout, self.r.gpu
        assert g.bf16_tflops and g.memory_gb_s and g.pcie_gb_s and g.matmul_efficiency, "predictable"
        assert g.attention_efficiency and g.attention_backward_efficiency, "predictable"
        dense, moe = sum(c.dense for c in chunks), sum(c.moe for c in chunks)
        layers, output = dense + moe, chunks[-1].output
        operations = g.bf16_tflops * 1e12 * p.tp * p.cp
        product, memory = 1 / (operations * g.matmul_efficiency), 1 / (g.memory_gb_s * 1e9)
        # Operations a token, a multiply and an add being two.
        projections = 4 * m.hidden * m.head_dim * (m.heads + m.kv_heads)
        routed = 6 * m.hidden * m.expert_ffn * (m.top_k * IMBALANCE + m.shared_experts) + 2 * m.experts * m.hidden
        mlps = dense * 6 * m.hidden * m.ffn + moe * routed
        pair = flops(m).a_pair / m.layers * layers / operations
        kept = activations(replace(self.r, layout=replace(p, recompute=Recompute.none)))
        touched = TOUCHED * (layers * kept.attention + dense * kept.mlp + moe * kept.moe) / p.cp
        logits = TOUCHED * 4 * m.vocab / (p.tp * p.cp) if output else 0.0
        # Bytes a token. Attention and MLP each gather their input and scatter their output; routed experts exchange theirs.
        row = m.hidden * element_size(self.r) / p.cp
        exchanged = 2 * m.top_k * row * p.etp / p.tp * (1 - 1 / (p.ep * p.etp))
        keys = 2 * m.kv_heads * m.head_dim * element_size(self.r) / (p.tp * p.cp)
        away = layers * kept.waiting(p.recompute) / p.cp if p.offload else 0.0
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
            pair=pair / g.attention_efficiency,
            pair_backward=ATTENTION_BACKWARD * pair / g.attention_backward_efficiency,
        )

    def _after(self, held: list[Buffer]) -> dict[str, float]:
        """Gradients reduced and weights gathered over each buffer's ranks, and the weights updated."""
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
            # The embedded engine's states (12 bytes) come and go at once; slime's stay, and are updated there.
            embedded = r.engine.name is EngineName.megatron
            host = (24 if embedded else OPTIMIZER_BYTES) * parameters * r.cluster.gpus_per_node / (HOST_GB_S * 1e9)
            update = max(host, (12 if embedded else 4) * parameters / (LINK * r.gpu.pcie_gb_s * 1e9))
        return {"gradient reduction": reduced, "optimizer": update}

    def passes(self, stage: int, tokens: np.ndarray, pairs: np.ndarray) -> tuple[Parts, Parts]:
        """(forward, backward) passes of micro-batches with so many padded tokens and causal pairs."""
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
            # Sequence parallelism gathers the inputs once more for the weights' gradients.
            "tensor parallel": (1.5 + again) * a.tensor * tokens,
            "context parallel": np.maximum(0.0, 2 * a.ring * tokens - back) + (recompute is Recompute.full) * ring,
            "expert parallel": (1 + (again > 0)) * a.experts * tokens,
            "pipeline messages": a.message * tokens,
        }
        for one in (forward, backward):
            one["waiting for the host"] = np.maximum(0.0, a.host * tokens - np.add.reduce([*one.values()]))
        return forward, backward

    def step(self, tokens: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
        """Seconds of a step by part: [ranks, micro-batches] padded tokens and causal pairs. The parts are those of the
        slowest rank's busiest stage; `bubbles` is what it waits."""
        forward, backward = self.times(tokens, pairs)
        ends = self.pipeline.makespan(forward, backward)
        rank = int(ends.argmax())
        stage = int((forward + backward)[:, rank].sum(axis=1).argmax())
        down, up = self.passes(stage, tokens, pairs)
        parts = {name: float((down[name] + up[name])[rank].sum()) for name in down}
        return parts | {"bubbles": max(0.0, float(ends[rank]) - sum(parts.values()))} | self.after

    def times(self, tokens: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(forward, backward) [stages, ranks, micro-batches] seconds of every pass."""
        found = [self.passes(s, tokens, pairs) for s in range(self.r.layout.pp)]
        forward, backward = (np.stack([np.add.reduce([*one[i].values()]) for one in found]) for i in (0, 1))
        return self._together(forward), self._together(backward)

    def _together(self, times: np.ndarray) -> np.ndarray:
        """[stages, ranks, micro-batches]: data-parallel ranks that exchange tokens with each other's experts wait for the
        slowest of them in every micro-batch."""
        p = self.r.layout
        _, ranks, batches = times.shape
        spanned = -(-p.ep * p.etp // (p.tp * p.cp))
        groups = ranks // spanned if spanned and ranks % spanned == 0 else 1
        slowest = times.reshape(p.pp, groups, -1, batches).max(axis=2, keepdims=True)
        return np.broadcast_to(slowest, (p.pp, groups, ranks // groups, batches)).reshape(times.shape)

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.r.layout.pp, chunks=self.r.layout.vpp)
