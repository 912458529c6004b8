"""What is checked before anything starts: that this machine can hold what the recipe trains."""

from recipes.config import Recipe
from recipes.errors import PreflightError
from recipes.layout import world_size
from recipes.memory import Load, gpu_memory, memory_limit


def check_memory(recipe: Recipe) -> None:
    """Refuses a model whose weights, gradients and optimizer state alone, on all ranks, pass this machine's memory."""
    ranks = world_size(recipe)
    alike = ranks // recipe.layout.pp  # ranks of one pipeline stage
    stages = gpu_memory(recipe, Load([[1]]))
    needed = alike * sum(s.weights + s.gradients + s.optimizer + s.runtime for s in stages)
    there = memory_limit(recipe) * recipe.cluster.gpus_per_node
    if needed > there:
        raise PreflightError(
            f"{recipe.model.name} needs at least {needed / 1e9:,.0f} GB on {ranks} ranks (weights, gradients and Adam's "
            f"moments), this machine has {there / 1e9:,.0f} GB; write model=qwen3-tiny, or send it to a cluster"
        )
