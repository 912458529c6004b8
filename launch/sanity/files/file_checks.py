"""All checks of an export's files: whether a server can load them, and what training changed. The files are only read.

Every check runs regardless of the others' results. A tensor whose bytes are missing is left out of the checks that read it.
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
from launch.weights.shards import Shards, read_shards
from recipes.config import Model, Recipe
from recipes.errors import CheckpointError
from recipes.families.common.parts import OUTPUT


def file_checks(
    export: Path,
    base: Path,
    recipe: Recipe,
    rates: Sequence[float] | None,
    checkpoint: Path | None,
    *,
    console: Console,
    written: Path,
) -> list[Check]:
    """Compare a Hugging Face folder with the base it was trained from, and write what training changed to the file `written`.

    rates: the learning rate of every step, None if unknown. checkpoint: the trainer's checkpoint of the export's weights, None
    if it does not exist. Raise `CheckpointError` if the base cannot be read.
    """
    m = recipe.model
    of_base, shards = SafetensorsFolder(base), read_shards(export)
    training = tensor_values.reach(recipe.optim, rates)
    seen = tensor_values.compare(shards, of_base, m, training, checkpoint is not None, console)
    times = recipe.sanity.max_moved
    own = {
        name: s for name, s in seen.items() if not (m.tied and name == OUTPUT)
    }  # the copy of a tied embedding is left out
    text = moved.as_json(moved.cells(own.values(), m), training, times)
    write_text(written, json.dumps(text, indent=2) + "\n")
    trainer_check, exact = _compare_with_trainer(own, shards, checkpoint, m, console)
    return [
        *names_and_shapes.shape_checks(shards, of_base, m),
        *tensor_values.value_checks(seen, shards, m),
        trainer_check,
        misplaced.placement(misplaced.find(moved.trained(own, m)), exact),
        *moved.moved_checks(own, training, times, m),
        beside.mtp(seen, shards, of_base, m),
        *beside.other_file_checks(export, base, m),
    ]


def _compare_with_trainer(
    seen: dict[str, Seen], shards: Shards, checkpoint: Path | None, m: Model, console: Console
) -> tuple[Check, set[str]]:
    """Return the check against the trainer's checkpoint, and the names of the tensors that equal it bit for bit."""
    if checkpoint is None:
        return as_trained.not_compared(
            "the trainer's checkpoint does not exist; the tensors are compared with the base only"
        ), set()
    try:
        trained = as_trained.read_trained(checkpoint, shards, m, console)
    except CheckpointError as error:
        return as_trained.not_compared(str(error)), set()
    return as_trained.as_trained(seen, trained, checkpoint, m), as_trained.same(seen, trained)
