"""`ray job submit --working-dir . -- launch/limi.py ...` against a head on this machine, as the README has it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO
from tests.launch.support import alive, descendants

BIN = Path(sys.executable).parent


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head of our own, started with the environment first on its PATH; a folder as HOME, where a run's files go."""
    home = tmp_path_factory.mktemp("home")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PATH": f"{BIN}:{env['PATH']}", "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    ports = {name: str(free()) for name in ("--port", "--dashboard-port", "--dashboard-agent-listen-port")}
    options = [word for pair in ports.items() for word in pair]
    log = (home / "head.log").open("w")
    process = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--num-cpus", "2", *options],
        env=env, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['--dashboard-port']}"}, home
    started = [psutil.Process(process.pid), *descendants(process.pid)]
    for sign in (signal.SIGTERM, signal.SIGKILL):  # some of Ray's servers outlive SIGTERM
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(sign)
        started = alive(started, 5)


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
    short = ["optim.epochs=1", "sanity.min_tool_calls=0"]
    done = submit(env, "--working-dir", ".", "--", "launch/limi.py", "model=qwen3-tiny", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "limi" / "runs" / "qwen3-tiny" / "report.html").is_file()
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
