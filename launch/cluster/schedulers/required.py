"""What every scheduler needs of a recipe."""

from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.paths import local_root


def check_cluster(recipe: Recipe, target: str) -> None:
    """Raise `ConfigError` if the recipe names no nodes, or no folder that they see. target: the command's name."""
    c = recipe.cluster
    if c.name == "local":
        raise ConfigError(
            f"cluster=local is this machine, but {target} needs nodes",
            "write cluster=h100x8, or another cluster with GPUs",
        )
    if c.root == local_root() and not any(w.startswith("cluster.root=") for w in recipe.overrides):
        raise ConfigError(
            f"{target} runs on other machines",
            "write cluster.root=FOLDER on the command line, with a folder that every node sees",
        )
