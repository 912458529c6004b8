"""Errors of the operating system, made by the system itself: the path, the option it came from, what to type."""

import errno
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from data_prep.files import whole_folder, write_text
from recipes.compose.os_errors import named
from recipes.compose.recipe import compose_recipe
from recipes.errors import CheckpointError
from recipes.paths import REPO
from tests.launch.support import limi


def raised(action, *arguments):
    with pytest.raises(OSError) as error:
        action(*arguments)
    return error.value


def says(error, *words):
    return str(named(error, compose_recipe(list(words))))


def test_a_path_is_its_options_and_the_innermost_that_was_typed(tmp_path):
    root, out = tmp_path / "root", tmp_path / "root" / "packed"
    error = raised(os.listdir, out / "abc")
    here = [f"cluster.root={root}", f"data.out={out}"]
    assert says(error, *here) == (
        f"'{out}/abc', of data.out={out}: No such file or directory; write data.out=FOLDER you can write to"
    )
    assert f"'{out}/abc', of cluster.root={root}: " in says(error, here[0]), "data.out follows cluster.root"
    error = raised(os.mkdir, root / "a")
    assert says(error, f"cluster.root={root}/a/b").startswith(f"'{root}/a', of cluster.root={root}/a/b: "), "on its way"
    assert says(raised(os.listdir, out), *here).startswith(f"data.out='{out}': ")
    assert says(raised(os.listdir, f"{out}er"), f"data.out={out}") == f"'{out}er': No such file or directory"


def test_what_is_only_read_is_not_asked_to_be_written(tmp_path):
    path = tmp_path / "data.jsonl"
    assert says(raised(os.stat, path), f"data.path={path}").endswith("; write data.path=FILE that can be read")
    python = tmp_path / "python"
    error = raised(subprocess.run, [str(python)])
    assert says(error, "engine=slime", f"engine.python={python}") == (
        f"engine.python='{python}': No such file or directory; write engine.python=PYTHON that can be read"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_what_another_user_keeps_is_named(tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    secret.chmod(0o700)
    tmp_path.chmod(0o711)
    os.seteuid(65534)
    try:
        read, write = raised(os.listdir, secret), raised(os.mkdir, tmp_path / "new")
    finally:
        os.seteuid(0)
    assert says(read, f"model.checkpoint={secret}").endswith(
        "Permission denied; let this user read it, or write model.checkpoint=FOLDER that can be read"
    )
    assert says(write, f"cluster.root={tmp_path}").endswith("write cluster.root=FOLDER you can write to")


def test_what_is_in_the_way_of_a_folder_is_named_itself(tmp_path):
    (tmp_path / "runs").touch()
    error = raised((tmp_path / "runs" / "x" / "y").mkdir)
    assert says(error, f"cluster.root={tmp_path}") == (
        f"'{tmp_path}/runs', of cluster.root={tmp_path}: Not a directory; move it away, or write cluster.root=FOLDER"
    )
    error = raised((tmp_path / "runs" / "root").mkdir)
    assert says(error, f"cluster.root={tmp_path}/runs/root/deep").endswith("write cluster.root=FOLDER you can write to")


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path):
    dangling, loop = tmp_path / "dangling", tmp_path / "loop"
    dangling.symlink_to("/nowhere/at/all")
    loop.symlink_to(loop)
    assert "it is a link to '/nowhere/at/all', which leads nowhere" in says(
        raised(dangling.mkdir), f"cluster.root={dangling}"
    )
    assert "Too many levels of symbolic links" in says(raised(os.listdir, loop), f"data.path={loop}")


def test_a_name_too_long(tmp_path):
    long = tmp_path / ("a" * 300)
    assert "File name too long; write cluster.root=FOLDER" in says(raised(long.mkdir), f"cluster.root={long}")


def test_a_limit_of_the_process_is_named_and_no_path_blamed(tmp_path):
    (tmp_path / "a").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        error = raised(os.open, tmp_path / "a", os.O_RDONLY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert says(error, f"cluster.root={tmp_path}").endswith(
        "Too many open files; raise the limit of open files, and run the same command: ulimit -n 65536"
    )


def test_files_of_the_checkout_and_of_variables(monkeypatch, tmp_path):
    error = raised(os.stat, REPO / "hydra_conf" / "nothing.yaml")
    assert says(error).endswith(f"`git -C {REPO} status` shows what of the checkout is not as it was")
    monkeypatch.setenv("HOME", str(tmp_path))
    error = raised(os.stat, tmp_path / ".cache" / "x")
    assert says(error).endswith("set HOME=FOLDER you can write to, before the command")


def test_an_error_without_a_number_keeps_its_words():
    assert str(named(ConnectionError("no server"), None)) == "ConnectionError: no server"
    assert str(named(OSError(), None)) == "OSError"


@pytest.fixture
def small(tmp_path):
    """A disk of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_names_what_was_written(small):
    error = raised(write_text, small / "deep" / "file", "x" * 200_000)
    assert (error.errno, error.filename) == (errno.ENOSPC, str(small / "deep" / "file"))
    assert not list((small / "deep").iterdir()), "nothing half written"


def test_a_full_disk_that_a_library_in_rust_quotes(small):
    import numpy as np
    from safetensors.numpy import save_file

    def write():
        with whole_folder(small / "hf") as scratch:
            save_file({"a": np.zeros(1 << 18)}, scratch / "model.safetensors")

    error = raised(write)
    assert (error.errno, error.filename) == (errno.ENOSPC, str(small / "hf"))
    assert not list(small.iterdir())


def test_an_error_with_words_of_its_own_keeps_them(tmp_path):
    with (
        pytest.raises(CheckpointError, match=re.escape("cannot be written (os error 28)")),
        whole_folder(tmp_path / "a"),
    ):
        raise CheckpointError("cannot be written (os error 28)", "make room")


@pytest.mark.run
def test_a_full_data_out_is_not_blamed_on_cluster_root(small, root):
    done = limi("data", f"cluster.root={root}", f"data.out={small}")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"PreflightError: '{small}/\w+', of data.out={small}: No space left on device; make room there, or write "
        r"data.out=FOLDER on another disk\n",
        done.stderr,
    )


def test_a_data_out_below_a_file(root, tmp_path):
    (tmp_path / "file").touch()
    done = limi("data", f"cluster.root={root}", f"data.out={tmp_path}/file/x")
    assert done.returncode == 2
    assert done.stderr == (
        f"PreflightError: '{tmp_path}/file', of data.out={tmp_path}/file/x: Not a directory; write data.out=FOLDER you can write to\n"
    )


def test_a_root_that_nobody_can_write_to():
    done = limi("plan", "cluster.root=/proc/x")
    assert done.returncode == 2
    assert done.stderr == (
        "PreflightError: cluster.root='/proc/x': No such file or directory; write cluster.root=FOLDER you can write to\n"
    )
    assert not Path("/proc/x").exists()
