"""`glm4.5.sh`, the whole run on a cluster: its stages in order, and what it says without its words."""

import os
import re
import subprocess

import pytest

from recipes.paths import REPO

SCRIPT = REPO / "launch" / "cluster" / "glm4.5.sh"


def run(*words):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run([SCRIPT, *words], cwd="/", env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.run
def test_a_dry_run_goes_through_every_stage(tmp_path):
    done = run("http://127.0.0.1:8265", str(tmp_path), "dry_run=true", "run=mine", "optim.lr=2e-5")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^would run: (\w+)", done.stdout, re.M) == ["plan", "fetch", "check", "rehearse", "train"]
    assert done.stdout.count("lr: 2.0e-05") == 5
    assert f"make serve run=mine cluster.root={tmp_path} cluster.address=http://127.0.0.1:8265" in done.stdout


def test_without_its_words_it_shows_them():
    done = run()
    assert done.returncode == 2
    assert "glm4.5.sh http://HEAD:8265 /shared/limi [NAME=VALUE ...]" in done.stderr and "set -euo" not in done.stderr
