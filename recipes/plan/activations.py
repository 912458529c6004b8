"""Bytes that one micro-batch keeps on a rank from its forward pass to its backward pass.

Counted are the tensors that autograd saves in the project's layer spec, which is made to save what Transformer Engine does: a
norm its input and a number a row, a linear layer its input, SwiGLU its input, flash attention its queries, keys, values, output
and log-sum-exp. `tests/recipes/plan/test_memory_measured.py` measures them in a real forward pass; Transformer Engine's were read, not
measured.

All counts are bytes a token of the rank: t tokens after context parallelism, t / tp where sequence parallelism cuts them.
"""

from dataclasses import dataclass

from recipes.config import EngineName, Model, Recipe, Recompute
from recipes.families import facts
from recipes.plan.partition import Chunk, element_size

IMBALANCE = 1.25  # tokens that the busiest rank's experts get, over the mean


@dataclass(frozen=True)
class Activations:
    """Bytes a token of a rank. layer_input: of one layer, all that full recomputation keeps."""

    attention: float  # of one layer, from its norm to its projection
    mlp: float  # of one layer without experts, from its norm
    moe: float  # of one layer with experts, from its norm, at balanced experts times `imbalance`
    layer_input: float
    kept_attention: float  # of one layer: its kernel's result, and the log-sum-exp of every head
    embedding: float
    output: float  # final norm and the output layer's input
    rotation: float  # angles that all layers share
    softmax: float  # of the loss
    selective_mlp: float  # of an MLP that is computed again
    selective_moe: float
    mlp_gradients: float  # of one layer without experts, where its backward pass has most

    def chunk(self, chunk: Chunk, recompute: Recompute) -> float:
        """Of all layers of a chunk; the embedding, the output layer and the loss where it has them."""
        if recompute in (Recompute.linear, Recompute.full):
            layers = chunk.layers * self.waiting(recompute)
        elif recompute is Recompute.selective:
            layers = chunk.layers * self.attention + chunk.dense * self.selective_mlp + chunk.moe * self.selective_moe
        else:
            layers = chunk.layers * self.attention + chunk.dense * self.mlp + chunk.moe * self.moe
        return (
            layers + self.rotation + (self.embedding if chunk.embedding else 0) + (self.output if chunk.output else 0)
        )

    def waiting(self, recompute: Recompute) -> float:
        """What one layer keeps that is computed again from its input."""
        return self.layer_input + (self.kept_attention if recompute is Recompute.linear else 0.0)

    def again(self, chunk: Chunk, recompute: Recompute) -> float:
        """Of the layer that has most, what is there once it is computed again, beside what it kept."""
        if recompute is Recompute.none:
            return 0.0
        kept_mlp, kept_moe = self.selective_mlp, self.selective_moe
        if recompute is not Recompute.selective:
            kept_mlp = kept_moe = self.waiting(recompute) - self.attention
        return max(self.mlp - kept_mlp if chunk.dense else 0.0, self.moe - kept_moe if chunk.moe else 0.0)

    def gradients(self, chunk: Chunk) -> float:
        """Inside the layer that has most, beside what it kept."""
        return max(self.mlp_gradients if chunk.dense else 0.0, self.moe if chunk.moe else 0.0)


def activations(r: Recipe, imbalance: float = IMBALANCE) -> Activations:
    """For the recipe's model, layout and precision. imbalance: tokens of this rank's experts over the mean."""
    m, p = r.model, r.layout
    size = element_size(r)
    cut = 1 / p.tp if p.sp else 1.0  # of tokens, between the blocks
    hidden = cut * m.hidden * size
    rows = cut * 4  # one fp32 number a token
    return Activations(
        attention=2 * hidden + rows + _attention(r, size),
        mlp=2 * hidden + rows + 3 * m.ffn / p.tp * size,
        moe=2 * hidden + rows + _experts(m, cut, p.tp, p.etp, size, imbalance) if m.experts else 0.0,
        layer_input=hidden,
        kept_attention=m.heads / p.tp * (m.head_dim * size + 4),
        embedding=8 + (p.tp > 1),
        output=2 * hidden + rows,
        rotation=4 * m.rope_fraction * m.head_dim,
        softmax=_softmax(r),
        selective_mlp=hidden,
        selective_moe=2 * hidden + rows,
        # Of SwiGLU's result and its two inputs, when the result itself is gone; of the layer's output.
        mlp_gradients=hidden + 2 * m.ffn / p.tp * size,
    )


def _softmax(r: Recipe) -> float:
    """The softmax in fp32 with the place of the label; in chunks, which are computed again, this engine keeps the label and one fp32
    number."""
    if r.layout.loss_chunk is None:
        return 4 * r.model.vocab / r.layout.tp + 9
    return 12.0 if r.engine.name is EngineName.megatron else 0.0


def _attention(r: Recipe, size: int) -> float:
    """Queries, keys and values as one product, again after norms and rotation, attention's output and log-sum-exp."""
    m, p = r.model, r.layout
    heads, kv_heads, d = m.heads / p.tp, m.kv_heads / p.tp, m.head_dim * size
    product = (heads + 2 * kv_heads) * d
    # Queries, keys and values stay parts of the product, save that several groups' queries are copied out for their norm.
    norms = (heads * d if kv_heads > 1 else 0) + 4 * (heads + kv_heads) if m.qk_norm else 0
    return product + norms + (heads + kv_heads) * d + heads * d + 4 * heads


def _experts(m: Model, cut: float, tp: int, etp: int, size: int, imbalance: float) -> float:
    """Router, dispatched tokens and both products of routed and shared experts.

    The router keeps scores and maps, by its family.
    """
    kept = facts(m.family).router
    router = cut * kept.bytes_of(m) if kept else 0.0
    # Each choice is a row at its expert; expert tensor parallelism gathers the rows of etp ranks and cuts the columns.
    rows = cut * m.top_k * etp * imbalance
    routed = rows * (m.hidden * size + 3 * m.expert_ffn / etp * size + 4)
    shared = 3 * m.shared_experts * m.expert_ffn / tp * size
    return router + routed + shared
