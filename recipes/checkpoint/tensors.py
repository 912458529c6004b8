"""The tensors of a model's checkpoint: Megatron's name, Hugging Face's names and their shapes, from the recipe alone."""

import re

from recipes.config import Model
from recipes.families import facts
from recipes.families.common.parts import Links, Tensors


def links(m: Model) -> Links:
    """Every parameter and the router's bias, by its global Megatron name (layers and experts counted over all ranks)."""
    return facts(m.family).links(m)


def trained(m: Model) -> Tensors:
    """Every tensor that training starts from; of a tied output layer the embedding alone."""
    return {name: shape for link in links(m).values() for name, shape in link.hf.items()}


def mtp(m: Model) -> Tensors:
    """Every tensor of the release's multi-token-prediction layers, which are not trained."""
    return facts(m.family).mtp(m)


def is_mtp(name: str, m: Model) -> bool:
    """Whether a Hugging Face tensor belongs to a multi-token-prediction layer, numbered after the model's own."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= m.layers
