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


def attention(m: Model, ours: str, theirs: str) -> Links:
    """Return a layer's attention with the norm before it. ours, theirs: prefixes of Megatron's and Hugging Face's names."""
    theirs_own = theirs + "self_attn."
    rows = {"q": m.heads * m.head_dim, "k": m.kv_heads * m.head_dim, "v": m.kv_heads * m.head_dim}
    found = {
        ours + "self_attention.linear_qkv.layer_norm_weight": Link({theirs + "input_layernorm.weight": (m.hidden,)}),
        ours + "self_attention.linear_qkv.weight": Link(
            {f"{theirs_own}{c}_proj.weight": (n, m.hidden) for c, n in rows.items()}, Join.qkv
        ),
        ours + "self_attention.linear_proj.weight": Link({theirs_own + "o_proj.weight": (m.hidden, rows["q"])}),
    }
    if m.qkv_bias:
        biases: Tensors = {f"{theirs_own}{c}_proj.bias": (n,) for c, n in rows.items()}
        found[ours + "self_attention.linear_qkv.bias"] = Link(biases, Join.qkv)
    if m.qk_norm:
        for c in "qk":
            found[f"{ours}self_attention.{c}_layernorm.weight"] = Link({f"{theirs_own}{c}_norm.weight": (m.head_dim,)})
    return found


def dense(m: Model, ours: str, theirs: str) -> Links:
    """Return a layer's dense MLP with the norm before it. ours, theirs: as in `attention`."""
    norm = Link({theirs + "post_attention_layernorm.weight": (m.hidden,)})
    return {ours + "mlp.linear_fc1.layer_norm_weight": norm} | mlp(m, m.ffn, ours + "mlp.", theirs + "mlp.")


def mlp(m: Model, ffn: int, ours: str, theirs: str, expert: str = "") -> Links:
    """Return gate, up and down of one MLP with `ffn` columns. expert: the expert's number, if Megatron's names end with one."""
    return {
        f"{ours}linear_fc1.weight{expert}": Link(
            {theirs + "gate_proj.weight": (ffn, m.hidden), theirs + "up_proj.weight": (ffn, m.hidden)}, Join.gate_up
        ),
        f"{ours}linear_fc2.weight{expert}": Link({theirs + "down_proj.weight": (m.hidden, ffn)}),
    }
