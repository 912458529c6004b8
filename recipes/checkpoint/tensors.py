"""The tensors of a model's checkpoint, from the recipe alone: Megatron names, Hugging Face names and shapes."""

import re

from recipes.config import Model
from recipes.families import facts
from recipes.families.common.parts import Links, Tensors


def links(m: Model) -> Links:
    """Return every parameter and the router's bias by global Megatron name, with layers and experts counted over all ranks."""
    return facts(m.family).links(m)


def trained(m: Model) -> Tensors:
    """Return every tensor that training starts from. A tied output layer has no tensor besides the embedding."""
    return {name: shape for link in links(m).values() for name, shape in link.hf.items()}


def mtp(m: Model) -> Tensors:
    """Return every tensor of the release's multi-token-prediction layers, which are not trained."""
    return facts(m.family).mtp(m)


def is_mtp(name: str, m: Model) -> bool:
    """Return whether a Hugging Face tensor belongs to a multi-token-prediction layer; these have the last layer numbers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= m.layers
