"""Mapping from rows of the trainer's tensors to the export's: an independent implementation of Megatron's names and row orders.

`launch/weights/hf_names.py` loads the base and writes exports. This module only compares and shares no code with it, so that a
mistake is not made in both. Megatron's tensors are named as in a torch_dist checkpoint, with their layer and expert numbers inserted.
"""

import re

import numpy as np

from recipes.config import Model

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_WHOLE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_FUSED = re.compile(r"self_attention\.linear_qkv\.(weight|bias)")
_MLP = re.compile(r"(mlp|mlp\.shared_experts|mlp\.experts\.\d+)\.linear_fc([12])\.weight")


def parameter(key: str, lead: tuple[int, ...]) -> str:
    """Return the name of the parameter at the leading indices `lead` of a stored tensor that holds all layers or all experts."""
    numbers = iter(lead)
    if (layers := re.fullmatch(r"decoder\.layers\.(\D.*)", key)) is not None:
        key = f"decoder.layers.{next(numbers)}.{layers[1]}"
    if ".experts.experts." in key:
        key = key.replace(".experts.experts.", f".experts.{next(numbers)}.")
    return key


def leading(key: str) -> int:
    """Return how many leading indices of a stored tensor are layer or expert numbers: 0, 1 or 2."""
    return bool(re.match(r"decoder\.layers\.\D", key)) + (".experts.experts." in key)


def homes(name: str, rows: int, m: Model) -> dict[str, np.ndarray]:
    """Return {tensor of the export: its rows in the parameter `name`, in the export's order}.

    rows: the parameter's number of rows. The result is empty for a parameter that an export takes from the base. Raise `KeyError`
    or `ValueError` if no model has a parameter of that name.
    """
    every = np.arange(rows)
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: every}
    _, _, layer, rest = name.split(".", 3)
    prefix = f"model.layers.{layer}."
    if rest == "mlp.router.expert_bias":
        return {}
    if (fused := _FUSED.fullmatch(rest)) is not None:
        return {f"{prefix}self_attn.{of}_proj.{fused[1]}": taken for of, taken in _attention(m).items()}
    if (mlp := _MLP.fullmatch(rest)) is None:
        return {prefix + _WHOLE[rest]: every}
    if mlp[2] == "2":
        return {f"{prefix}{mlp[1]}.down_proj.weight": every}
    gates, ups = every[: rows // 2], every[rows // 2 :]
    return {f"{prefix}{mlp[1]}.gate_proj.weight": gates, f"{prefix}{mlp[1]}.up_proj.weight": ups}


def _attention(m: Model) -> dict[str, np.ndarray]:
    """Return the rows of q, k and v in the fused QKV tensor.

    For each key-value head it holds that group's query heads, then the key head, then the value head.
    """
    asking = m.heads // m.kv_heads
    heads = {
        "q": [q // asking * (asking + 2) + q % asking for q in range(m.heads)],
        "k": [kv * (asking + 2) + asking for kv in range(m.kv_heads)],
        "v": [kv * (asking + 2) + asking + 1 for kv in range(m.kv_heads)],
    }
    return {of: (np.array(at)[:, None] * m.head_dim + np.arange(m.head_dim)).ravel() for of, at in heads.items()}
