"""Parts of the families' decoders: Megatron's parameters, each with the Hugging Face tensors that it joins.

| join | Megatron's tensor |
|---|---|
| same | the one tensor |
| qkv | for every key-value group: its queries, its key, its value |
| gate_up | gate above up; with tensor parallelism each rank holds its part of both |
"""

from dataclasses import dataclass
from enum import Enum

from recipes.config import Model

Tensors = dict[str, tuple[int, ...]]  # shapes by Hugging Face name
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


class Join(Enum):
    """How Hugging Face tensors are joined to one Megatron tensor; see the table above."""

    same = "same"
    qkv = "qkv"
    gate_up = "gate_up"


@dataclass(frozen=True)
class Link:
    """The Hugging Face tensors that one Megatron tensor joins, in order, with their shapes."""

    hf: Tensors
    join: Join = Join.same


Links = dict[str, Link]  # by Megatron name


def ends(m: Model) -> Links:
    """Return the embedding, the last norm and the output layer."""
    rows = (m.vocab, m.hidden)
    return {
        "embedding.word_embeddings.weight": Link({EMBEDDING: rows}),
        "decoder.final_layernorm.weight": Link({"model.norm.weight": (m.hidden,)}),
        "output_layer.weight": Link({EMBEDDING if m.tied else OUTPUT: rows}),
    }


def of_layer(layer: int) -> tuple[str, str]:
    """Return the prefixes of a layer's names: Megatron's and Hugging Face's. Both count layers from 0."""
    return f"decoder.layers.{layer}.", f"model.layers.{layer}."


def attention(m: Model, megatron: str, hf: str) -> Links:
    """Return a layer's attention with the norm before it. megatron, hf: prefixes of the names."""
    hf_attention = hf + "self_attn."
    rows = {"q": m.heads * m.head_dim, "k": m.kv_heads * m.head_dim, "v": m.kv_heads * m.head_dim}
    found = {
        megatron + "self_attention.linear_qkv.layer_norm_weight": Link({hf + "input_layernorm.weight": (m.hidden,)}),
        megatron + "self_attention.linear_qkv.weight": Link(
            {f"{hf_attention}{c}_proj.weight": (n, m.hidden) for c, n in rows.items()}, Join.qkv
        ),
        megatron + "self_attention.linear_proj.weight": Link({hf_attention + "o_proj.weight": (m.hidden, rows["q"])}),
    }
    if m.qkv_bias:
        biases: Tensors = {f"{hf_attention}{c}_proj.bias": (n,) for c, n in rows.items()}
        found[megatron + "self_attention.linear_qkv.bias"] = Link(biases, Join.qkv)
    if m.qk_norm:
        for c in "qk":
            found[f"{megatron}self_attention.{c}_layernorm.weight"] = Link(
                {f"{hf_attention}{c}_norm.weight": (m.head_dim,)}
            )
    return found


def dense(m: Model, megatron: str, hf: str) -> Links:
    """Return a layer's dense MLP with the norm before it. megatron, hf: as in `attention`."""
    norm = Link({hf + "post_attention_layernorm.weight": (m.hidden,)})
    return {megatron + "mlp.linear_fc1.layer_norm_weight": norm} | mlp(m, m.ffn, megatron + "mlp.", hf + "mlp.")


def mlp(m: Model, ffn: int, megatron: str, hf: str, expert: str = "") -> Links:
    """Return gate, up and down of one MLP with `ffn` columns. expert: the expert's number, if Megatron's names end with one."""
    return {
        f"{megatron}linear_fc1.weight{expert}": Link(
            {hf + "gate_proj.weight": (ffn, m.hidden), hf + "up_proj.weight": (ffn, m.hidden)}, Join.gate_up
        ),
        f"{megatron}linear_fc2.weight{expert}": Link({hf + "down_proj.weight": (m.hidden, ffn)}),
    }
