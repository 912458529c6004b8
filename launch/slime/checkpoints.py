"""Bookkeeping of the checkpoints that Megatron-LM writes under slime. Megatron counts from 0: `iter_0000099` holds 100 steps.

Megatron writes into the folder under its final name. Afterwards it writes the folder's number to
`latest_checkpointed_iteration.txt`. The files of a large model are terabytes, so their sizes are recorded, not their hashes.
"""

import json
import shutil
from pathlib import Path

from data_prep.files import write_text
from launch.run.run_folder import RECORD, RunFolder, sizes
from launch.run.which_run import TRACKER, latest_iteration
from recipes import json_file


def settle(run: RunFolder) -> None:
    """Record the checkpoints completed since the last call, and remove those beyond `engine.keep_last`."""
    latest = latest_iteration(run.root / "checkpoints")
    for folder in _folders(run):
        if _iteration(folder) <= latest and not (folder / RECORD).exists():
            run.write_record(folder, _iteration(folder) + 1, sizes(folder))
            run.remove_old()


def remove_parts(run: RunFolder) -> None:
    """Record the checkpoints that a killed job completed, and remove those it left incomplete.

    Raise `ConfigError` if that job had another recipe.
    """
    latest = latest_iteration(run.root / "checkpoints")
    unrecorded = [folder for folder in _folders(run) if not (folder / RECORD).exists()]
    if any(_iteration(folder) <= latest for folder in unrecorded):
        if (record := run.root / "checkpoints" / RECORD).exists():
            run.compare(json_file.read_json(record, f"move '{record.parent}' away to start anew"))
        settle(run)
    for folder in unrecorded:
        if folder.exists() and not (folder / RECORD).exists():
            shutil.rmtree(folder)


def go_on_from(run: RunFolder, checkpoint: Path | None) -> str:
    """Make Megatron load `checkpoint`, and return the value of slime's `--load`: the checkpoints folder, or the base if there is no
    checkpoint.

    Also record the settings that the run must not change, so that a later start can compare its recipe with them.
    """
    write_text(run.root / "checkpoints" / RECORD, json.dumps(run.fixed, indent=2) + "\n")
    tracker = run.root / "checkpoints" / TRACKER
    if checkpoint is None:
        tracker.unlink(missing_ok=True)
        return run.recipe.model.checkpoint
    write_text(tracker, str(_iteration(checkpoint)))
    return str(checkpoint.parent)


def _folders(run: RunFolder) -> list[Path]:
    return sorted(run.root.glob("checkpoints/iter_*"))


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))
