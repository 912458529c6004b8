"""The checkpoints that Megatron-LM writes under slime, `iter_0000099` after a hundred steps, as the run folder counts them.

Megatron writes into the folder by its final name and then that name's number into `latest_checkpointed_iteration.txt`. The files of
a large model are terabytes: their sizes are recorded, not their hashes.
"""

import shutil
from pathlib import Path

from data_prep.files import write_text
from launch.run_folder import RECORD, RunFolder, sizes

TRACKER = "latest_checkpointed_iteration.txt"


def settle(run: RunFolder) -> None:
    """Records what has been written whole since the last call, and removes what is older than `engine.keep_last`."""
    latest = _latest(run)
    for folder in _folders(run):
        if _iteration(folder) <= latest and not (folder / RECORD).exists():
            run.write_record(folder, _iteration(folder) + 1, sizes(folder))
            run.remove_old()


def remove_parts(run: RunFolder) -> None:
    """Removes what a killed job had half written."""
    settle(run)
    for folder in _folders(run):
        if not (folder / RECORD).exists():
            shutil.rmtree(folder)


def go_on_from(run: RunFolder, checkpoint: Path | None) -> str:
    """Makes `checkpoint` the one that Megatron loads; what slime's `--load` gets: the base where there is none."""
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


def _latest(run: RunFolder) -> int:
    """The last iteration that was written whole; -1 where none was, or where Megatron is about to say so."""
    try:
        return int((run.root / "checkpoints" / TRACKER).read_text())
    except (FileNotFoundError, ValueError):
        return -1
