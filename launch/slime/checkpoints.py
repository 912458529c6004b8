"""The checkpoints that Megatron-LM writes under slime, `iter_0000099` after a hundred steps, as the run folder counts them.

Megatron writes into the folder by its final name and then that name's number into `latest_checkpointed_iteration.txt`. The files of
a large model are terabytes: their sizes are recorded, not their hashes.
"""

import json
import shutil
from pathlib import Path

from data_prep.files import write_text
from launch.run.run_folder import RECORD, RunFolder, sizes
from launch.run.which_run import TRACKER, latest_iteration
from recipes import json_file


def settle(run: RunFolder) -> None:
    """Records what has been written whole since the last call, and removes what is older than `engine.keep_last`."""
    latest = latest_iteration(run.root / "checkpoints")
    for folder in _folders(run):
        if _iteration(folder) <= latest and not (folder / RECORD).exists():
            run.write_record(folder, _iteration(folder) + 1, sizes(folder))
            run.remove_old()


def remove_parts(run: RunFolder) -> None:
    """Records what a killed job wrote whole at its end, and removes what it had half written.

    Raises `ConfigError` where that job was of another recipe.
    """
    latest = latest_iteration(run.root / "checkpoints")
    unrecorded = [folder for folder in _folders(run) if not (folder / RECORD).exists()]
    if any(_iteration(folder) <= latest for folder in unrecorded):
        if (begun := run.root / "checkpoints" / RECORD).exists():
            run.compare(json_file.read(begun, f"move '{begun.parent}' away to start anew"))
        settle(run)
    for folder in unrecorded:
        if folder.exists() and not (folder / RECORD).exists():
            shutil.rmtree(folder)


def go_on_from(run: RunFolder, checkpoint: Path | None) -> str:
    """Makes `checkpoint` the one that Megatron loads; what slime's `--load` gets: the base where there is none.

    What the run must keep is written beside them, for a start after this one.
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
