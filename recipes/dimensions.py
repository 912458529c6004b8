"""Exact parameter counts of a model, and the floating-point operations of a packed batch, from its dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.config import Model


@dataclass(frozen=True)
class Parameters:
    """Parameters by part, each summed over all layers.

    The multi-token-prediction layers of a release are not trained. They are counted in `mtp` and not in `total`.
    """

    embedding: int
    output: int  # 0 if it shares the embedding
    attention: int  # projections, biases and QK norms
    mlp: int  # of dense layers and shared experts
    experts: int  # routed experts
    router: int
    norms: int
    mtp: int  # multi-token-prediction layers
    active_experts: int  # the part of `experts` that processes one token

    @property
    def total(self) -> int:
        """All trained parameters."""
        return self.embedding + self.output + self.attention + self.mlp + self.experts + self.router + self.norms

    @property
    def active(self) -> int:
        """Parameters that take part in a token's forward pass, including all rows of the embedding."""
        return self.total - self.experts + self.active_experts


def parameters(m: Model) -> Parameters:
    """Return the exact parameter counts of the Hugging Face checkpoint. The router's expert bias is a buffer and not counted."""
    moe_layers = m.layers - m.dense_layers if m.experts else 0
    expert = 3 * m.hidden * m.expert_ffn
    shared = m.shared_experts * expert
    dense = 3 * m.hidden * m.ffn
    attention = _attention(m)
    # One whole layer with its own embedding and output layer, a projection of two states to one, and three more norms.
    mtp = m.mtp_layers * (
        attention + m.experts * (expert + m.hidden) + shared + 5 * m.hidden + 2 * m.hidden**2 + 2 * m.vocab * m.hidden
    )
    return Parameters(
        embedding=m.vocab * m.hidden,
        output=0 if m.tied else m.vocab * m.hidden,
        attention=m.layers * attention,
        mlp=(m.layers - moe_layers) * dense + moe_layers * shared,
        experts=moe_layers * m.experts * expert,
        router=moe_layers * m.experts * m.hidden,
        norms=(2 * m.layers + 1) * m.hidden,
        mtp=mtp,
        active_experts=moe_layers * m.top_k * expert,
    )


def _attention(m: Model) -> int:
    """Return the parameters of one layer's attention, without the norm before it."""
    heads = m.heads + 2 * m.kv_heads
    projections = m.hidden * m.head_dim * (heads + m.heads)
    return projections + (heads * m.head_dim if m.qkv_bias else 0) + (2 * m.head_dim if m.qk_norm else 0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass; a multiply and an add count as two.

    A backward pass takes twice as many. Full recomputation adds as many as a forward pass.
    """

    a_token: int  # per token: matrix products, including the output layer
    a_pair: int  # per pair of a query and a visible key: scores and weighted values, over all layers

    def sequence(self, length: int) -> int:
        """Return the operations of one sequence. Causal attention of n tokens has n (n + 1) / 2 pairs."""
        return self.a_token * length + self.a_pair * (length * (length + 1) // 2)

    def batch(self, lengths: Sequence[int]) -> int:
        """Return the operations of packed sequences, which do not attend to each other."""
        return sum(map(self.sequence, lengths))


def flops(m: Model) -> Flops:
    """Return the operations of a model's forward pass."""
    p = parameters(m)
    # Norms, biases and the embedding lookup are not matrix products and are not counted.
    output = m.vocab * m.hidden
    heads = m.heads + 2 * m.kv_heads
    projections = m.layers * m.hidden * m.head_dim * (heads + m.heads)
    weights = projections + p.mlp + p.active_experts + p.router + output
    return Flops(a_token=2 * weights, a_pair=4 * m.heads * m.head_dim * m.layers)
