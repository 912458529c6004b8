"""What a user types for a stage, as advice shows it."""

import shlex

from recipes.config import Recipe

_OF_MACHINES = ("cluster=", "cluster.", "gpu=", "gpu.", "engine=", "engine.", "layout=", "layout.")


def make(target: str, recipe: Recipe, cluster: str | None = None) -> str:
    """`make TARGET` with the words of this command. cluster: another one, in the place of all that the words say of machines."""
    words = recipe.words
    if cluster is not None:
        kept = [w for w in words if w.startswith("cluster.root=") or not w.startswith(_OF_MACHINES)]
        words = [*kept, f"cluster={cluster}"]
    model = [f"MODEL={w.removeprefix('model=')}" for w in words if w.startswith("model=")]
    return shlex.join(["make", target, *model, *(w for w in words if not w.startswith("model="))])
