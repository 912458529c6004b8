"""Qwen3: dense layers, QK norms, no biases."""

from recipes.config import Model
from recipes.families.parts import Links, Tensors, attention, dense, ends, of_layer


def links(m: Model) -> Links:
    """Every parameter, by its global Megatron name."""
    found = ends(m)
    for layer in range(m.layers):
        found |= attention(m, *of_layer(layer)) | dense(m, *of_layer(layer))
    return found


def mtp(m: Model) -> Tensors:
    """Qwen3 has no multi-token-prediction layers."""
    return {}
