"""What is checked before anything starts: that this machine can hold what the recipe trains."""

import psutil

from recipes.config import Recipe
from recipes.dimensions import parameters
from recipes.errors import PreflightError
from recipes.layout import model_parallel, world_size


def check_memory(recipe: Recipe) -> None:
    """Refuses a model whose fp32 weights, gradients and Adam moments alone, on all ranks, pass this machine's memory.

    Every rank holds weights and gradients of its part of the model; the moments are spread over the ranks that hold the
    same part.
    """
    p = recipe.layout
    copies = world_size(recipe) // (model_parallel(p) // p.cp)
    needed = parameters(recipe.model).total * (8 * copies + 8)
    there = psutil.virtual_memory().total
    if needed > there:
        raise PreflightError(
            f"{recipe.model.name} needs at least {needed / 1e9:,.0f} GB on {world_size(recipe)} ranks (weights, gradients and "
            f"Adam's moments in fp32, {copies} copies), this machine has {there / 1e9:,.0f} GB; write model=qwen3-tiny, or send "
            "it to a cluster"
        )
