"""kill -9 at any moment of `make data`: no folder that is left loads as whole, and the next try makes the same bytes."""

import json
import random
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from data_prep.pack.dataset import open_dataset
from data_prep.pack.pack import FILES
from recipes.paths import REPO
from tests.data_prep.support import TOOL, assistant, call, result, user
from tests.launch.support import alive


def start(root, bases, source, out, workers):
    words = ["data=openai", f"data.path={source}", f"data.out={out}", f"data.workers={workers}", f"cluster.root={root}"]
    command = [sys.executable, "launch/limi.py", "data", *words, f"model.checkpoint={bases['qwen3-tiny']}"]
    return subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def whole(out):
    """The folders under `out` that open as a data set."""
    found = []
    for folder in sorted(out.glob("*")) if out.is_dir() else []:
        if not folder.name.startswith("."):
            open_dataset(folder)
            found.append(folder)
    return found


@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(1, 20, marks=pytest.mark.slow),
        pytest.param(2, 20, marks=pytest.mark.slow),
    ],
)
def test_no_half_made_folder_passes_for_whole(root, bases, tmp_path, workers, kills):
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    with source.open("w") as file:
        for n in range(200):
            messages = [
                user(f"task {n}"),
                assistant("look", call("1", n=n)),
                result("1", "word " * 200),
                assistant("done"),
            ]
            file.write(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n")
    started = time.monotonic()
    assert start(root, bases, source, tmp_path / "calm", workers).wait() == 0
    duration = time.monotonic() - started
    (calm,) = whole(tmp_path / "calm")
    rng = random.Random(kills)
    for _ in range(kills):
        process = start(root, bases, source, out, workers)
        time.sleep(rng.uniform(0.3, 1.0) * duration)
        family = (
            [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            if process.poll() is None
            else []
        )
        process.kill()
        process.wait()
        assert not alive(family), "the workers end with their parent"
        for folder in whole(out):
            assert (folder / "manifest.json").read_bytes() == (calm / "manifest.json").read_bytes()
            shutil.rmtree(folder)
    assert start(root, bases, source, out, workers).wait() == 0
    (made,) = whole(out)
    assert all((made / name).read_bytes() == (calm / name).read_bytes() for name in (*FILES, "manifest.json"))
