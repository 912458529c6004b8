"""Commands that messages suggest: with the overrides of this command, or for the same run."""

import shlex

from recipes.config import Recipe
from recipes.paths import REPO

_OF_MACHINES = ("cluster=", "cluster.", "gpu=", "gpu.", "engine=", "engine.", "layout=", "layout.")


def of_words(target: str, r: Recipe, cluster: str | None = None) -> str:
    """Return `make TARGET` with the overrides of this command.

    cluster: another cluster; it replaces all overrides of machines except `cluster.root`.
    """
    words = r.overrides
    if cluster is not None:
        kept = [w for w in words if w.startswith("cluster.root=") or not w.startswith(_OF_MACHINES)]
        words = [*kept, f"cluster={cluster}"]
    model = [f"MODEL={w.removeprefix('model=')}" for w in words if w.startswith("model=")]
    return shlex.join(["make", target, *model, *(w for w in words if not w.startswith("model="))])


def of_run(target: str, r: Recipe, *words: str) -> str:
    """Return `make TARGET run=NAME WORDS` for the recipe's run, with its folder and its cluster's address."""
    return of_place(target, r, f"run={r.run}", *words)


def of_place(target: str, r: Recipe, *words: str) -> str:
    """Return `make TARGET WORDS` with the cluster's address, and with the root if it is not the checkout."""
    root = [] if r.cluster.root == str(REPO) else [f"cluster.root={r.cluster.root}"]
    address = [f"cluster.address={r.cluster.address}"] if r.cluster.address else []
    return shlex.join(["make", target, *words, *root, *address])
