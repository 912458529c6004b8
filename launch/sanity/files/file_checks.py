"""What an export's files alone tell: whether a server can load it, and what training moved. Nothing is changed.

Every check is made whatever the others found; a tensor whose bytes are not there is left out of those that read it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.files import write_text
from launch.checks import Check
from launch.sanity.files import as_trained, beside, misplaced, moved, names_and_shapes
from launch.sanity.tensors import tensor_values
from launch.sanity.tensors.compare_worker import Seen
from launch.weights.safetensors_folder import SafetensorsFolder
from launch.weights.shards import Shards, read
from recipes.config import Model, Recipe
from recipes.errors import CheckpointError
from recipes.families.common.parts import OUTPUT


def checks(
    export: Path,
    base: Path,
    recipe: Recipe,
    rates: Sequence[float] | None,
    checkpoint: Path | None,
    *,
    console: Console,
    written: Path,
) -> list[Check]:
    """Compares a Hugging Face folder with the one it was trained from, and writes what moved to the file `written`.

    rates: the learning rate of every step, None where it is not known. checkpoint: the trainer's, whose weights the export has,
    None where it is not there. Raises `CheckpointError` where the base cannot be read.
    """
    m = recipe.model
    of_base, found = SafetensorsFolder(base), read(export)
    training = tensor_values.reach(recipe.optim, rates)
    seen = tensor_values.compare(found, of_base, m, training, checkpoint is not None, console)
    times = recipe.sanity.max_moved
    own = {name: s for name, s in seen.items() if not (m.tied and name == OUTPUT)}  # a copy is beside the embedding
    text = moved.as_json(moved.cells(own.values(), m), training, times)
    write_text(written, json.dumps(text, indent=2) + "\n")
    of_trainer, exact = _of_trainer(own, found, checkpoint, m, console)
    return [
        *names_and_shapes.checks(found, of_base, m),
        *tensor_values.checks(seen, found, m),
        of_trainer,
        misplaced.check(misplaced.find(moved.trained(own, m)), exact),
        *moved.checks(own, training, times, m),
        beside.mtp(seen, found, of_base, m),
        *beside.checks(export, base, m),
    ]


def _of_trainer(
    seen: dict[str, Seen], found: Shards, checkpoint: Path | None, m: Model, console: Console
) -> tuple[Check, set[str]]:
    """The check, and the tensors that are the trainer's bit for bit."""
    if checkpoint is None:
        return as_trained.not_compared(
            "its checkpoint is not there, and what it holds is told beside the base alone"
        ), set()
    try:
        trained = as_trained.read(checkpoint, found, m, console)
    except CheckpointError as error:
        return as_trained.not_compared(str(error)), set()
    return as_trained.check(seen, trained, checkpoint, m), as_trained.same(seen, trained)
