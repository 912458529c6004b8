"""`ray job submit --working-dir . -- launch/limi.py ...` against a head on this machine, as the README has it."""

import subprocess
import time

import pytest

from tests.conftest import REPO
from tests.launch.states import content
from tests.launch.support import UNJUDGED, ray_cluster


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_cluster(tmp_path_factory.mktemp("home")) as cluster:
        yield {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.address}, cluster.home


def submit(env, *words):
    for _ in range(10):  # the job agent takes a while to come up
        done = subprocess.run(
            ["ray", "job", "submit", *words], env=env, cwd=REPO, capture_output=True, text=True, timeout=400
        )
        if "No available agent" not in done.stderr and "Failed to connect" not in done.stderr:
            return done
        time.sleep(3)
    return done


@pytest.mark.slow
def test_a_job_trains_in_place_and_stopping_it_ends_everything(head):
    env, home = head
    short = ["optim.epochs=1", *UNJUDGED]
    done = submit(env, "--working-dir", ".", "--", "launch/limi.py", "model=qwen3-tiny", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    run = home / "limi" / "runs" / "qwen3-tiny"
    assert (run / "report.html").is_file()
    before = content(run)
    again = submit(env, "--working-dir", ".", "--", "launch/limi.py", "model=qwen3-tiny", *short)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "qwen3-tiny is finished (" in again.stdout
    assert content(run) == before, "a job that is submitted again trains nothing again"
    submit(env, "--no-wait", "--submission-id", "stopped", "--working-dir", ".", "--", "launch/limi.py", "run=stopped")
    metrics = home / "limi" / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.2)
    subprocess.run(["ray", "job", "stop", "stopped"], env=env, check=True, capture_output=True)
    logs = subprocess.run(["ray", "job", "logs", "stopped"], env=env, capture_output=True, text=True).stdout
    assert "SIGTERM: saved after step" in logs
    time.sleep(3)
    left = subprocess.run(["pgrep", "-f", "launch/limi.py run=stopped"], capture_output=True, text=True).stdout
    assert not left
