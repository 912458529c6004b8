"""What a model's dimensions come to: exact parameter counts, and the floating-point operations of a packed batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.config import Model


@dataclass(frozen=True)
class Parameters:
    """Parameters by part, each summed over its layers. The multi-token-prediction layers of a release, which are not
    trained, stand apart; `total` is without them."""

    embedding: int
    output: int  # 0 where it shares the embedding
    attention: int  # projections, biases and QK norms
    mlp: int  # dense layers' and shared experts'
    experts: int  # routed
    router: int
    norms: int
    mtp: int
    active_experts: int  # of `experts`, those that a token passes

    @property
    def total(self) -> int:
        return self.embedding + self.output + self.attention + self.mlp + self.experts + self.router + self.norms

    @property
    def active(self) -> int:
        """Those that take part in a token's forward pass, the embedding's rows included."""
        return self.total - self.experts + self.active_experts


def parameters(m: Model) -> Parameters:
    """Exact counts of the Hugging Face checkpoint; the router's expert bias, a buffer, is not counted."""
    moe_layers = m.layers - m.dense_layers if m.experts else 0
    expert = 3 * m.hidden * m.expert_ffn
    shared = m.shared_experts * expert
    dense = 3 * m.hidden * m.ffn
    attention = _attention(m)
    # One whole layer with its own embedding and output, a projection of two states to one, and three norms.
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
    heads = m.heads + 2 * m.kv_heads
    projections = m.hidden * m.head_dim * (heads + m.heads)
    return projections + (heads * m.head_dim if m.qkv_bias else 0) + (2 * m.head_dim if m.qk_norm else 0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass, a multiply and an add being two. A backward pass takes twice as many,
    full recomputation as many again."""

    a_token: int  # in matrix products, the output layer included
    a_pair: int  # of a query and a key it sees: scores and weighted values, over all layers

    def sequence(self, length: int) -> int:
        """Of one sequence; causal attention sees n (n + 1) / 2 pairs."""
        return self.a_token * length + self.a_pair * (length * (length + 1) // 2)

    def batch(self, lengths: Sequence[int]) -> int:
        """Of sequences packed together, which do not see each other."""
        return sum(map(self.sequence, lengths))


def flops(m: Model) -> Flops:
    p = parameters(m)
    # Norms, biases and the embedding's lookup are no matrix products.
    output = m.vocab * m.hidden
    heads = m.heads + 2 * m.kv_heads
    projections = m.layers * m.hidden * m.head_dim * (heads + m.heads)
    weights = projections + p.mlp + p.active_experts + p.router + output
    return Flops(a_token=2 * weights, a_pair=4 * m.heads * m.head_dim * m.layers)
