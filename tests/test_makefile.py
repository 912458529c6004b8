"""`make` itself: from other folders, with other Pythons, and with environments that were moved, cut short or without an index."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.make import make

PYTHON = Path(sys.base_prefix) / "bin" / "python3.11"
NO_INDEX = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def checkout(tmp_path):
    """What make reads of a checkout, in a folder with a space in its name."""
    folder = tmp_path / "my checkout"
    (folder / "launch").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-gpu.txt", "launch/limi.py"):
        shutil.copy2(REPO / name, folder / name)
    for name in ("model", "cluster"):
        shutil.copytree(REPO / "hydra_conf" / name, folder / "hydra_conf" / name)
    return folder


def test_from_another_folder_the_command_is_named_that_works(checkout, tmp_path):
    done = make("-f", str(checkout / "Makefile"), "plan", "MODEL=qwen3-4b", "optim.lr=1e-5", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(
        rf".*: \*\*\* this folder is not the checkout; write make -C '{checkout}' plan (optim\.lr=1e-5|MODEL=qwen3-4b| )+\.  Stop\.\n",
        done.stderr,
    )
    done = make("-C", str(checkout), "help", cwd=tmp_path)
    assert done.returncode == 0 and "  plan           Layout, memory" in done.stdout


def stand_in(folder, says):
    """A Python of which `says` is the answer to each `-c`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && case "$2" in {says} esac\nexec {PYTHON} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ("*version_info*) exit 1;;", "is not Python 3.11; write PYTHON=/path/to/python3.11"),
        ("*ensurepip*) exit 1;;", "has no module ensurepip; install python3.11-venv, or write PYTHON=/path/to/another/python3.11"),
    ],
)  # fmt: skip
def test_a_python_that_cannot_make_an_environment_is_named(checkout, tmp_path, answers, says):
    python = stand_in(tmp_path, answers)
    done = make("setup", f"PYTHON={python}", "LOCK=constraints.txt", cwd=checkout)
    assert done.returncode == 2
    assert f"\n'{python}' {says}\n" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.run
@pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}")
@pytest.mark.parametrize("state", ["none", "half made"])
def test_an_environment_is_made_whatever_was_there_and_a_missing_index_named(checkout, state):
    """half made: a set-up that was interrupted, by a Python that is gone."""
    python = checkout / ".venv" / "bin" / "python"
    if state != "none":
        python.parent.mkdir(parents=True)
        python.symlink_to("/gone/python3.11")
    done = make("plan", f"PYTHON={PYTHON}", cwd=checkout, **NO_INDEX)
    assert done.returncode == 2
    assert "Setting up .venv from constraints.txt" in done.stderr
    assert (
        "\nthe packages of .venv could not be installed; where no package index is in reach set PIP_INDEX_URL or HTTPS_PROXY, and the "
        "same command goes on\n"
    ) in done.stderr
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr and "No such file" not in done.stderr
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0, "so far it came, and from here it goes on"
    before = python.stat(follow_symlinks=False).st_mtime_ns
    make("plan", f"PYTHON={PYTHON}", "LOCK=constraints.txt", cwd=checkout, **NO_INDEX)
    assert python.stat(follow_symlinks=False).st_mtime_ns == before, "what is there is kept"


def test_a_whole_environment_of_another_machine_is_named_and_left(checkout):
    """On a shared disk it may be in use."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/gone/python3.11")
    (checkout / ".venv" / ".ready").write_text("constraints.txt\n")
    done = make("plan", cwd=checkout, **NO_INDEX)
    assert done.returncode == 2
    assert done.stderr.startswith(
        ".venv is of a Python that is not here; write make clean, and the same command makes it anew\nmake: *** "
    )
    assert python.is_symlink()
    assert make("clean", cwd=checkout).returncode == 0 and not (checkout / ".venv").exists()


def test_no_script_is_called_by_the_path_that_its_first_line_holds():
    """It is that of the folder in which the environment was made."""
    called = re.findall(r"(?:\$\(BIN\)|/bin)/(\w+)", (REPO / "Makefile").read_text())
    assert set(called) == {"python", "bash"}
