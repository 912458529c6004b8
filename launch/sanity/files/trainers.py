"""Which rows of the trainer's tensors are which of the export's: a second reading of Megatron's names and orders.

`launch/weights/hf_names.py` loads the base and writes exports; this only compares, and takes nothing from it, so that one mistake
is not made in both. Megatron's tensors are named as in a torch_dist checkpoint, with the numbers of their layer and expert put in.
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
    """The name of what lies at `lead`, the first indices of a checkpoint's tensor that holds all layers or all experts."""
    numbers = iter(lead)
    if (layers := re.fullmatch(r"decoder\.layers\.(\D.*)", key)) is not None:
        key = f"decoder.layers.{next(numbers)}.{layers[1]}"
    if ".experts.experts." in key:
        key = key.replace(".experts.experts.", f".experts.{next(numbers)}.")
    return key


def leading(key: str) -> int:
    """How many of the first indices of a checkpoint's tensor are numbers of a layer or an expert."""
    return bool(re.match(r"decoder\.layers\.\D", key)) + (".experts.experts." in key)


def homes(name: str, rows: int, m: Model) -> dict[str, np.ndarray]:
    """{tensor of the export: the rows of the parameter `name`, which has so many, in the export's order}; none for what an export
    takes from the base. Raises `KeyError` where no model has a parameter of that name."""
    every = np.arange(rows)
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: every}
    _, _, layer, rest = name.split(".", 3)
    theirs = f"model.layers.{layer}."
    if rest == "mlp.router.expert_bias":
        return {}
    if (fused := _FUSED.fullmatch(rest)) is not None:
        return {f"{theirs}self_attn.{of}_proj.{fused[1]}": taken for of, taken in _attention(m).items()}
    if (mlp := _MLP.fullmatch(rest)) is None:
        return {theirs + _WHOLE[rest]: every}
    if mlp[2] == "2":
        return {f"{theirs}{mlp[1]}.down_proj.weight": every}
    gates, ups = every[: rows // 2], every[rows // 2 :]
    return {f"{theirs}{mlp[1]}.gate_proj.weight": gates, f"{theirs}{mlp[1]}.up_proj.weight": ups}


def _attention(m: Model) -> dict[str, np.ndarray]:
    """The fused tensor has, for every head of keys, the heads of queries that ask it, then that of its keys, then of its values."""
    asking = m.heads // m.kv_heads
    heads = {
        "q": [q // asking * (asking + 2) + q % asking for q in range(m.heads)],
        "k": [kv * (asking + 2) + asking for kv in range(m.kv_heads)],
        "v": [kv * (asking + 2) + asking + 1 for kv in range(m.kv_heads)],
    }
    return {of: (np.array(at)[:, None] * m.head_dim + np.arange(m.head_dim)).ravel() for of, at in heads.items()}
