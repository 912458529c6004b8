"""Activation memory: bytes that one micro-batch saves on a rank between its forward and its backward pass.

The model counts the tensors that autograd saves in the project's layer spec. That spec saves what Transformer Engine saves:

- a norm: its input and one number per row;
- a linear layer: its input;
- SwiGLU: its input;
- flash attention: queries, keys, values, output and log-sum-exp.

`tests/recipes/plan/test_memory_measured.py` measures these tensors in a real forward pass. Those of Transformer Engine were read
from its source, not measured.

All counts are bytes per token of the rank. A rank has t tokens after context parallelism. Where sequence parallelism splits a
tensor, it has t / tp.
"""

from dataclasses import dataclass

from recipes.config import EngineName, Model, Recipe, Recompute
from recipes.families import facts
from recipes.plan.partition import Chunk, element_size

IMBALANCE = 1.25  # tokens of the busiest rank's experts, as a multiple of the mean


@dataclass(frozen=True)
class Activations:
    """Saved bytes per token of a rank, by part."""

    attention: float  # of one layer, from its norm to its projection
    mlp: float  # of one dense layer, from its norm
    moe: float  # of one layer with experts, from its norm; balanced experts, times the imbalance
    layer_input: float  # of one layer; full recomputation saves nothing else
    attention_output: float  # of one layer: the attention kernel's output and the log-sum-exp of every head
    embedding: float
    output: float  # the final norm's tensors and the output layer's input
    rotation: float  # rotary angles, shared by all layers
    softmax: float  # of the loss
    selective_mlp: float  # of a dense MLP under selective recomputation
    selective_moe: float  # of an expert layer under selective recomputation
    mlp_gradients: float  # peak of the gradients inside one dense layer's backward pass

    def chunk(self, chunk: Chunk, recompute: Recompute) -> float:
        """Return the saved bytes per token of all layers of a chunk, plus the embedding and the output layer if it has them."""
        if recompute in (Recompute.linear, Recompute.full):
            layers = chunk.layers * self.saved_per_layer(recompute)
        elif recompute is Recompute.selective:
            layers = chunk.layers * self.attention + chunk.dense * self.selective_mlp + chunk.moe * self.selective_moe
        else:
            layers = chunk.layers * self.attention + chunk.dense * self.mlp + chunk.moe * self.moe
        return (
            layers + self.rotation + (self.embedding if chunk.embedding else 0) + (self.output if chunk.output else 0)
        )

    def saved_per_layer(self, recompute: Recompute) -> float:
        """Return the bytes per token that one layer saves under linear or full recomputation."""
        return self.layer_input + (self.attention_output if recompute is Recompute.linear else 0.0)

    def recomputed(self, chunk: Chunk, recompute: Recompute) -> float:
        """Return the bytes per token that recomputing one layer adds to what the layer saved, for the largest layer of a chunk."""
        if recompute is Recompute.none:
            return 0.0
        saved_mlp, saved_moe = self.selective_mlp, self.selective_moe
        if recompute is not Recompute.selective:
            saved_mlp = saved_moe = self.saved_per_layer(recompute) - self.attention
        return max(self.mlp - saved_mlp if chunk.dense else 0.0, self.moe - saved_moe if chunk.moe else 0.0)

    def gradients(self, chunk: Chunk) -> float:
        """Return the bytes per token of the gradients inside one layer's backward pass, for the largest layer of a chunk."""
        return max(self.mlp_gradients if chunk.dense else 0.0, self.moe if chunk.moe else 0.0)


def activations(r: Recipe, imbalance: float = IMBALANCE) -> Activations:
    """Return the activations of the recipe's model, layout and precision.

    imbalance: tokens of this rank's experts, as a multiple of the mean.
    """
    m, p = r.model, r.layout
    size = element_size(r)
    cut = 1 / p.tp if p.sp else 1.0  # share of the tokens that a rank holds between the blocks
    hidden = cut * m.hidden * size
    rows = cut * 4  # one fp32 number per token
    return Activations(
        attention=2 * hidden + rows + _attention(r, size),
        mlp=2 * hidden + rows + 3 * m.ffn / p.tp * size,
        moe=2 * hidden + rows + _experts(m, cut, p.tp, p.etp, size, imbalance) if m.experts else 0.0,
        layer_input=hidden,
        attention_output=m.heads / p.tp * (m.head_dim * size + 4),
        embedding=8 + (p.tp > 1),
        output=2 * hidden + rows,
        rotation=4 * m.rope_fraction * m.head_dim,
        softmax=_softmax(r),
        selective_mlp=hidden,
        selective_moe=2 * hidden + rows,
        # Gradients of SwiGLU's output and of its two inputs, after the output itself is freed; gradient of the layer's output.
        mlp_gradients=hidden + 2 * m.ffn / p.tp * size,
    )


def _softmax(r: Recipe) -> float:
    """Return the bytes per token that the loss saves: the fp32 softmax and the index of the label.

    A chunked loss recomputes the softmax. With it the embedded engine saves only the label and one fp32 number.
    """
    if r.layout.loss_chunk is None:
        return 4 * r.model.vocab / r.layout.tp + 9
    return 12.0 if r.engine.name is EngineName.megatron else 0.0


def _attention(r: Recipe, size: int) -> float:
    """Return the saved bytes per token of attention: QKV as one product, QKV after norms and rotation, output, log-sum-exp."""
    m, p = r.model, r.layout
    heads, kv_heads, d = m.heads / p.tp, m.kv_heads / p.tp, m.head_dim * size
    product = (heads + 2 * kv_heads) * d
    # Queries, keys and values are views of the product. With several key-value heads, the norm copies the queries.
    norms = (heads * d if kv_heads > 1 else 0) + 4 * (heads + kv_heads) if m.qk_norm else 0
    return product + norms + (heads + kv_heads) * d + heads * d + 4 * heads


def _experts(m: Model, cut: float, tp: int, etp: int, size: int, imbalance: float) -> float:
    """Return the saved bytes per token of the router, the dispatched tokens and both products of routed and shared experts.

    What the router saves (scores and maps) depends on the family.
    """
    family_router = facts(m.family).router
    router = cut * family_router.bytes_of(m) if family_router else 0.0
    # Each choice of a token is one row at an expert. Expert tensor parallelism gathers the rows of etp ranks and splits the columns.
    rows = cut * m.top_k * etp * imbalance
    routed = rows * (m.hidden * size + 3 * m.expert_ffn / etp * size + 4)
    shared = 3 * m.shared_experts * m.expert_ffn / tp * size
    return router + routed + shared
