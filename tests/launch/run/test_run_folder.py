"""Which checkpoint is whole, which is kept, and what a second start finds."""

import errno
import fcntl
import os

import pytest

from launch.run.run_folder import RunFolder
from recipes.errors import CheckpointError, ConfigError, PreflightError
from tests.launch.support import recipe_of


def opened(root, *words):
    run = RunFolder(*recipe_of(root, *words))
    return run, run.open()


def save(run, step):
    with run.new_checkpoint(step) as folder:
        (folder / "weights").write_text(str(step))


def test_checkpoints_are_kept_whole_and_few(root):
    run, (step, last, note) = opened(root, "run=few", "engine.keep_last=2")
    assert (step, last, note) == (0, None, None)
    for step in (10, 20, 30):
        save(run, step)
    assert [p.name for p in run.checkpoints()] == ["step_000020", "step_000030"]
    with (
        pytest.raises(CheckpointError, match="step 40 could not be written.*step_000030 is whole"),
        run.new_checkpoint(40) as folder,
    ):
        (folder / "weights").write_text("half")
        raise OSError("No space left on device")
    assert sorted(p.name for p in (run.root / "checkpoints").iterdir()) == ["step_000020", "step_000030"]


def test_a_second_start_goes_on_and_another_recipe_does_not(root):
    run, _ = opened(root, "run=again")
    save(run, 10)
    run._lock.close()
    (run.root / "checkpoints" / ".step_000020").mkdir()
    _, (step, last, note) = opened(root, "run=again")
    assert (step, last.name) == (10, "step_000010")
    assert "going on from" in note
    assert not (run.root / "checkpoints" / ".step_000020").exists(), "what a crash left half-written is gone"


def test_a_refused_start_changes_nothing(root):
    run, _ = opened(root, "run=kept")
    save(run, 10)
    run._lock.close()
    config = (run.root / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"optim\.lr=0\.006 there, 0\.5 here\); write run=OTHER, or anew=true, which moves"
    ):
        opened(root, "run=kept", "optim.lr=0.5")
    assert (run.root / "config.yaml").read_text() == config


def test_a_run_moves_aside_whole_when_it_is_told_to_and_not_before(root):
    run, _ = opened(root, "run=done")
    save(run, 10)
    (run.root / "report.html").write_text("")
    run._lock.close()
    again, (step, last, _) = opened(root, "run=done")
    assert (step, last.name) == (10, "step_000010"), "a page is no mark"
    aside = again.set_aside()
    assert [aside] == [*root.glob("runs/done.*")] and not again.root.exists()
    assert (aside / "checkpoints" / "step_000010" / "weights").read_text() == "10"
    assert again.set_aside() is None
    assert again.open() == (0, None, None)


def test_a_run_that_is_being_trained_does_not_move_aside(root):
    run, _ = opened(root, "run=held")
    with pytest.raises(PreflightError, match="run=held is being trained by another process"):
        RunFolder(*recipe_of(root, "run=held")).set_aside()
    assert run.root.is_dir()


def spoil_content(folder):
    (folder / "weights").write_text("0")


def spoil_size(folder):
    (folder / "weights").write_text("")


def spoil_by_removal(folder):
    (folder / "weights").unlink()


def spoil_record(folder):
    record = folder / "limi.json"
    record.write_text(record.read_text()[:40])


@pytest.mark.parametrize("spoil", [spoil_content, spoil_size, spoil_by_removal, spoil_record])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(root, spoil):
    name = spoil.__name__
    run, _ = opened(root, f"run={name}", "engine.keep_last=3")
    for step in (10, 20, 30):
        save(run, step)
    run._lock.close()
    spoil(run.root / "checkpoints" / "step_000030")
    again, (step, last, note) = opened(root, f"run={name}", "engine.keep_last=3")
    assert (step, last.name) == (20, "step_000020")
    assert "step_000030 is damaged" in note and "going on from" in note
    assert (run.root / "checkpoints" / "damaged_step_000030").is_dir()
    save(again, 30)
    assert again.checkpoints()[-1].name == "step_000030"


def test_where_no_checkpoint_is_whole_a_run_starts_anew(root):
    run, _ = opened(root, "run=none")
    save(run, 10)
    run._lock.close()
    spoil_content(run.root / "checkpoints" / "step_000010")
    _, (step, last, note) = opened(root, "run=none")
    assert (step, last) == (0, None)
    assert "starting anew" in note


@pytest.mark.parametrize("spoil", [spoil_content, spoil_record])
def test_a_replay_starts_from_the_last_whole_checkpoint_before_its_step(root, spoil):
    run, _ = opened(root, f"run=replay-{spoil.__name__}", "engine.keep_last=3")
    for step in (10, 20, 30):
        save(run, step)
    assert [run.before(step)[0] for step in (31, 30, 11, 10)] == [30, 20, 10, 0]
    spoil(run.root / "checkpoints" / "step_000020")
    assert [run.before(step)[0] for step in (31, 30)] == [30, 10]


def test_a_file_system_without_locks_is_refused_with_the_way_out(root, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(PreflightError, match=r"cannot be locked \(Function not implemented\).*Lustre: -o flock"):
        opened(root, "run=unlocked")
