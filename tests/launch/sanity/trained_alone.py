"""Reads a checkpoint as the check of an export does, in one process, and prints by how many bytes it grew: `python -m
tests.launch.sanity.trained_alone RECIPE FOLDER CHECKPOINT`."""

import sys
from pathlib import Path

from rich.console import Console

from launch.sanity.files import as_trained
from launch.weights.shards import read_shards
from recipes.compose.recipe import from_yaml
from tests.launch.export_alone import largest


def main(written: str, name: str, checkpoint: str) -> None:
    recipe, found = from_yaml(Path(written)), read_shards(Path(name))
    as_trained.BATCH_BYTES = 1 << 40  # one process does it all
    before = largest()
    trained = as_trained.read_trained(Path(checkpoint), found, recipe.model, Console(quiet=True))
    assert trained.keys() == found.files.keys()
    print(largest() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
