"""GLM-4.5: leading dense layers, then layers with routed and shared experts; multi-token-prediction layers after them."""

from recipes.config import Model
from recipes.families.parts import Link, Links, Tensors, attention, dense, ends, mlp, of_layer


def links(m: Model) -> Links:
    """Every parameter and the router's bias, by its global Megatron name (layers and experts counted over all ranks)."""
    found = ends(m)
    for layer in range(m.layers):
        names = of_layer(layer)
        found |= attention(m, *names) | (dense if layer < m.dense_layers or not m.experts else _experts)(m, *names)
    return found


def mtp(m: Model) -> Tensors:
    """A layer with experts, and around it: two norms and a projection of token and state, a norm, an embedding and an output
    layer of its own."""
    rows, one = (m.vocab, m.hidden), (m.hidden,)
    found: Tensors = {}
    for layer in range(m.layers, m.layers + m.mtp_layers):
        ours, theirs = of_layer(layer)
        found |= {
            theirs + "embed_tokens.weight": rows, theirs + "enorm.weight": one, theirs + "hnorm.weight": one,
            theirs + "eh_proj.weight": (m.hidden, 2 * m.hidden), theirs + "shared_head.norm.weight": one,
            theirs + "shared_head.head.weight": rows,
        }  # fmt: skip
        for link in (attention(m, ours, theirs) | _experts(m, ours, theirs)).values():
            found |= link.hf
    return found


def _experts(m: Model, ours: str, theirs: str) -> Links:
    """A layer's router, its experts and the norm before them."""
    found = {
        ours + "pre_mlp_layernorm.weight": Link({theirs + "post_attention_layernorm.weight": (m.hidden,)}),
        ours + "mlp.router.weight": Link({theirs + "mlp.gate.weight": (m.experts, m.hidden)}),
        ours + "mlp.router.expert_bias": Link({theirs + "mlp.gate.e_score_correction_bias": (m.experts,)}),
    }
    if m.shared_experts:
        together = m.shared_experts * m.expert_ffn
        found |= mlp(m, together, ours + "mlp.shared_experts.", theirs + "mlp.shared_experts.")
    for e in range(m.experts):
        found |= mlp(m, m.expert_ffn, ours + "mlp.experts.", f"{theirs}mlp.experts.{e}.", str(e))
    return found
