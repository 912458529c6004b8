"""GLM-4.5 and GLM-4.5-Air: leading dense layers, then layers with routed and shared experts, then multi-token-prediction layers."""

from recipes.config import Model
from recipes.families.common.facts import Chat, Config, Facts, Parsers, Router, Tiny
from recipes.families.common.parts import Link, Links, Tensors, attention, dense, ends, mlp, of_layer


def links(m: Model) -> Links:
    """Return every parameter and the router's bias by global Megatron name, with layers and experts counted over all ranks."""
    found = ends(m)
    for layer in range(m.layers):
        names = of_layer(layer)
        found |= attention(m, *names) | (dense if layer < m.dense_layers or not m.experts else _experts)(m, *names)
    return found


def mtp(m: Model) -> Tensors:
    """Return every tensor of the multi-token-prediction layers.

    Such a layer is a layer with experts, plus two norms and a projection of token and state, a last norm, and its own embedding
    and output layer.
    """
    rows, one = (m.vocab, m.hidden), (m.hidden,)
    found: Tensors = {}
    for layer in range(m.layers, m.layers + m.mtp_layers):
        megatron, hf = of_layer(layer)
        found |= {
            hf + "embed_tokens.weight": rows, hf + "enorm.weight": one, hf + "hnorm.weight": one,
            hf + "eh_proj.weight": (m.hidden, 2 * m.hidden), hf + "shared_head.norm.weight": one,
            hf + "shared_head.head.weight": rows,
        }  # fmt: skip
        for link in (attention(m, megatron, hf) | _experts(m, megatron, hf)).values():
            found |= link.hf
    return found


def _experts(m: Model, megatron: str, hf: str) -> Links:
    """Return a layer's router, its experts and the norm before them."""
    found = {
        megatron + "pre_mlp_layernorm.weight": Link({hf + "post_attention_layernorm.weight": (m.hidden,)}),
        megatron + "mlp.router.weight": Link({hf + "mlp.gate.weight": (m.experts, m.hidden)}),
        megatron + "mlp.router.expert_bias": Link({hf + "mlp.gate.e_score_correction_bias": (m.experts,)}),
    }
    if m.shared_experts:
        together = m.shared_experts * m.expert_ffn
        found |= mlp(m, together, megatron + "mlp.shared_experts.", hf + "mlp.shared_experts.")
    for e in range(m.experts):
        found |= mlp(m, m.expert_ffn, megatron + "mlp.experts.", f"{hf}mlp.experts.{e}.", str(e))
    return found


def _router_bytes(m: Model) -> float:
    """Return the saved bytes per token: 9 per expert and 20 per chosen expert, plus 4.

    Source: `moe_utils.topk_routing_with_score_function`, `permute`.
    """
    return 9 * m.experts + 20 * m.top_k + 4


FACTS = Facts(
    chat=Chat(
        roles=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        stops=("<|user|>", "<|observation|>"),
        closing="<|user|>",
        closing_calls="<|observation|>",
    ),
    config=Config(
        "Glm4MoeConfig",
        names={
            "n_routed_experts": "experts", "num_experts_per_tok": "top_k", "moe_intermediate_size": "expert_ffn",
            "n_shared_experts": "shared_experts", "first_k_dense_replace": "dense_layers",
            "routed_scaling_factor": "router_scaling", "num_nextn_predict_layers": "mtp_layers", "use_qk_norm": "qk_norm",
        },
        constants={"norm_topk_prob": True, "n_group": 1, "topk_group": 1},
    ),
    links=links,
    mtp=mtp,
    router=Router("sigmoid", expert_bias=True, pre_softmax=True, bytes_of=_router_bytes),
    parsers=Parsers("glm45", "glm45", always_reasons=True),
    tiny=Tiny(
        model="glm4.5-tiny",
        special=(
            "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>",
            "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<tool_response>",
            "</tool_response>",
        ),
        eos=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
)  # fmt: skip
