"""Which of Megatron's checkpoints are whole, which stay, and what a start goes on from."""

import errno
import os
from pathlib import Path

import pytest

from launch.run.run_folder import RunFolder
from launch.run.which_run import pick
from launch.slime import checkpoints
from recipes.errors import ConfigError, PreflightError
from tests.launch.slime.support import begun
from tests.launch.support import recipe_of


def test_only_whole_checkpoints_count(root, tmp_path):
    recipe, data, heldout = recipe_of(root, "engine=slime", f"cluster.root={tmp_path}", "engine.keep_last=2")
    run = RunFolder(recipe, data, heldout)
    run.open()
    folders = [run.root / "checkpoints" / f"iter_{i:07}" for i in (3, 7, 11, 15)]
    for each in folders:
        each.mkdir(parents=True)
        (each / "__0_0.distcp").write_bytes(b"weights")
    assert run.checkpoints() == []
    tracker = run.root / "checkpoints" / checkpoints.TRACKER
    tracker.write_text("")  # Megatron is about to write it
    checkpoints.settle(run)
    assert run.checkpoints() == []
    tracker.write_text("11")
    checkpoints.settle(run)
    assert run.checkpoints() == folders[1:3], "keep_last=2 of three"
    assert run.checkpoint(12) == folders[2]
    checkpoints.remove_parts(run)
    assert not folders[3].exists()
    (folders[2] / "__0_0.distcp").write_bytes(b"cut")
    completed, last, said = run.open()
    assert (completed, last) == (8, folders[1]) and "is damaged" in str(said)
    assert checkpoints.go_on_from(run, last) == str(run.root / "checkpoints")
    assert tracker.read_text() == "7"
    assert checkpoints.go_on_from(run, None) == recipe.model.checkpoint
    assert not tracker.exists()


def written(run: RunFolder, iteration: int) -> Path:
    """A checkpoint as Megatron leaves it."""
    made = run.root / "checkpoints" / f"iter_{iteration:07}"
    made.mkdir(parents=True)
    (made / ".metadata").write_bytes(b"weights")
    return made


def at(run: RunFolder) -> tuple[int, Path | None, str | None]:
    """A start of slime, up to slime itself."""
    found = run.open(lambda: checkpoints.remove_parts(run))
    checkpoints.go_on_from(run, found[1])
    return found


def test_a_second_command_touches_nothing_of_the_first(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    saving = written(first, 3)
    with pytest.raises(PreflightError, match="is being trained by another process"):
        at(begun(tmp_path, root))
    assert saving.exists(), "the save that is in progress"


def test_a_whole_checkpoint_that_was_not_recorded_counts_for_its_own_recipe_only(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    whole, part = written(first, 3), written(first, 7)
    (whole.parent / checkpoints.TRACKER).write_text("3")
    first._lock.close()  # killed
    with pytest.raises(ConfigError, match=r"optim\.lr=.* there, 0\.5 here"):
        at(begun(tmp_path, root, "optim.lr=0.5"))
    assert whole.exists() and part.exists()
    completed, last, _ = at(begun(tmp_path, root))
    assert (completed, last) == (4, whole)
    assert not part.exists()


def test_what_a_killed_write_left_beside_the_checkpoints_does_not_end_the_next_start(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    scratch = first.root / "checkpoints" / f".{checkpoints.TRACKER}.4711"
    scratch.write_text("3")
    first._lock.close()
    assert at(begun(tmp_path, root))[0] == 0
    assert not scratch.exists()


@pytest.mark.parametrize("text", ["", "99", None])
def test_checkpoints_that_were_recorded_are_found_whatever_the_tracker_says(root, tmp_path, text):
    run = begun(tmp_path, root)
    at(run)
    whole = written(run, 3)
    tracker = whole.parent / checkpoints.TRACKER
    tracker.write_text("3")
    checkpoints.settle(run)
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    assert pick(run.root, None) == (4, whole)
    run._lock.close()
    assert at(begun(tmp_path, root))[:2] == (4, whole)
    assert tracker.read_text() == "3", "what Megatron will load"


def test_a_folder_that_cannot_be_emptied_does_not_end_training(root, tmp_path, monkeypatch):
    run = begun(tmp_path, root, "engine.keep_last=1")
    at(run)
    older, newer = written(run, 3), written(run, 7)
    (older.parent / checkpoints.TRACKER).write_text("7")
    rmdir = os.rmdir

    def busy(path, **kwargs):  # as NFS, which keeps a removed file that is open as `.nfs…`
        if "iter_0000003" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        rmdir(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", busy)
    checkpoints.settle(run)
    assert run.checkpoints() == [newer]
