"""File systems that are full, slow or read-only: a run ends with the way out, or goes on as if nothing had happened."""

import contextlib
import os
import subprocess
import time

import pytest

from tests.launch.support import called, finish, metrics_of, start, wait_for_step


@contextlib.contextmanager
def mounted(folder, *words):
    """A file system of its own at `folder`, where this machine lets us mount one."""
    made = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a file system here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=48m", "tmpfs"):
        yield tmp_path


@pytest.fixture
def disk(tmp_path):
    """One that can be frozen: whoever writes to it waits."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot make a file system here: {made.stderr.strip()}")
    with mounted(folder, "-o", "loop", str(image)):
        yield folder


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_loadable(small_disk, uninterrupted):
    run = small_disk / "runs" / "full"
    process = start(small_disk, "run=full")
    wait_for_step(run, 7, process)
    assert (run / "checkpoints" / "step_000006").is_dir()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 65536)
    code, output = finish(process)
    assert code == 2, output
    assert "CheckpointError: the checkpoint of step 12 could not be written" in output
    assert "0 MB are free" in output
    assert "make room there" in output
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000006"]
    filler.unlink()
    code, output = finish(start(small_disk, "run=full"))
    assert code == 0, output
    assert metrics_of(run) == uninterrupted


def test_a_disk_too_small_is_refused_before_anything_starts(root):
    from launch.run.run_folder import check_room
    from recipes.compose.recipe import compose_recipe
    from recipes.errors import PreflightError

    with pytest.raises(PreflightError, match="GB free"):
        check_room(compose_recipe([f"cluster.root={root}"]), 10**18)
    if os.geteuid() != 0:
        with pytest.raises(PreflightError, match="cluster.root=FOLDER"):
            check_room(compose_recipe(["cluster.root=/proc/nowhere"]), 1)


@pytest.mark.slow
def test_a_save_waits_for_a_slow_file_system(disk, uninterrupted):
    """One that answers no write for some seconds, from before a save on."""
    run = disk / "runs" / "slow"
    process = start(disk, "run=slow")
    wait_for_step(run, 5, process)
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        time.sleep(8)
        assert process.poll() is None
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)
    code, output = finish(process)
    assert code == 0, output
    assert "retry" not in output
    assert metrics_of(run) == uninterrupted, "bit for bit"


def test_a_read_only_file_system_is_refused_before_anything_starts(tmp_path):
    with mounted(tmp_path, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        done = called("train", f"cluster.root={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert "PreflightError" in done.stderr and "Read-only file system" in done.stderr
    assert "cluster.root=FOLDER you can write to" in done.stderr
