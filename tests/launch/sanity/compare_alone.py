"""Compares the tensors of a folder with themselves in one process, and prints by how many bytes it grew: `python -m
tests.launch.sanity.compare_alone RECIPE FOLDER`."""

import sys
from pathlib import Path

from rich.console import Console

from launch.sanity.tensors import tensor_values
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import read_shards
from recipes.compose.recipe import from_yaml
from tests.launch.export_alone import largest


def main(written: str, name: str) -> None:
    recipe, folder = from_yaml(Path(written)), Path(name)
    tensor_values.BATCH_BYTES = 1 << 40  # one process does it all
    found = read_shards(folder)
    before = largest()
    reach = tensor_values.reach(recipe.optim, None)
    seen = tensor_values.compare(found, SafetensorsFolder(folder), recipe.model, reach, True, Console(quiet=True))
    assert len(seen) == len(found.files)
    print(largest() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
