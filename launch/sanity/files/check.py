"""What an export's files alone tell: whether a server can load it, and what training moved. Nothing is changed.

Every check is made whatever the others found; a tensor whose bytes are not there is left out of those that read it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.files import write_text
from launch.model.safetensors_folder import SafetensorsFolder
from launch.model.shards import read
from launch.sanity.checks import Check
from launch.sanity.files import beside, moved, shards, tensors
from recipes.config import Recipe
from recipes.families.parts import OUTPUT


def checks(
    export: Path, base: Path, recipe: Recipe, rates: Sequence[float] | None, *, console: Console, written: Path
) -> list[Check]:
    """Compares a Hugging Face folder with the one it was trained from, and writes what moved to the file `written`.

    rates: the learning rate of every step, None where it is not known. Raises `CheckpointError` where the base cannot be read.
    """
    m = recipe.model
    of_base, found = SafetensorsFolder(base), read(export)
    training = tensors.reach(recipe.optim, rates)
    seen = tensors.compare(found, of_base, m, training, console)
    times = recipe.sanity.max_moved
    own = {name: s for name, s in seen.items() if not (m.tied and name == OUTPUT)}  # a copy is beside the embedding
    text = moved.as_json(moved.cells(own.values(), m), training, times)
    write_text(written, json.dumps(text, indent=2) + "\n")
    return [
        *shards.checks(found, of_base, m),
        *tensors.checks(seen, found, m),
        *moved.checks(own, training, times, m),
        beside.mtp(seen, found, of_base, m),
        *beside.checks(export, base, m),
    ]
