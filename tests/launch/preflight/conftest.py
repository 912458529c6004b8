"""Shared by the tests of the nodes' checks."""

import os
import subprocess

import pytest


def git(folder, *words):
    author = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    done = subprocess.run(["git", *words], cwd=folder, env={**os.environ, **author}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """A slime with a patch, and a Megatron-LM to which it is applied: their folders and commits."""
    root = tmp_path_factory.mktemp("checkouts")
    found = {}
    for name in ("slime", "megatron"):
        (root / name).mkdir()
        git(root / name, "init", "--quiet")
        (root / name / "code.py").write_text("before\n")
        git(root / name, "add", "-A")
        git(root / name, "commit", "--quiet", "--message", name)
        found[name] = str(root / name), git(root / name, "rev-parse", "HEAD").strip()
    (root / "megatron" / "code.py").write_text("after\n")
    patches = root / "slime" / "docker" / "patch" / "latest"
    patches.mkdir(parents=True)
    (patches / "megatron.patch").write_text(git(root / "megatron", "diff"))
    return found
