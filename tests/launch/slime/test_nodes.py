"""slime as a job of two Ray nodes on this machine: submitted, watched, stopped, submitted again, and a trainer killed meanwhile."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch.run import metrics
from tests.launch.slime.support import on_cpu
from tests.launch.slime.test_resume import killing, of_run
from tests.launch.support import limi, ray_cluster

pytestmark = pytest.mark.contract

WORDS = [
    "model=qwen3-tiny", "engine=slime", "run=nodes", "cluster.nodes=2", "cluster.gpus_per_node=1", "optim.epochs=40",
    "optim.eval_steps=100", "engine.save_steps=20", "engine.timeout=300",
]  # fmt: skip


def wait_for(run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (run / metrics.NAME).exists() and metrics.completed(run) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} never came")


@pytest.mark.slow
def test_a_job_on_two_nodes_is_stopped_submitted_again_and_survives_a_killed_trainer(tmp_path):
    on_cpu()
    home, root = tmp_path / "home", tmp_path / "shared"
    home.mkdir()
    run = root / "runs" / "nodes"
    given = {name: os.environ[name] for name in ("SLIME_ROOT", "MEGATRON_ROOT")}
    python = os.environ["SLIME_PYTHON"]
    with ray_cluster(home, nodes=2, cpus=4, gpus=1, python=python, SLIME_PYTHON=python, **given) as cluster:
        words = [*WORDS, f"cluster.root={root}", f"cluster.address={cluster.address}"]
        said: list = []
        first = threading.Thread(target=lambda: said.append(limi("train", *words)))
        first.start()
        wait_for(run, 30)
        stopped = limi("stop", *words)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        first.join(120)
        assert said[0].returncode == 130, said[0].stdout + said[0].stderr
        assert not psutil.wait_procs(of_run(run), timeout=60)[1]
        before = metrics.completed(run)

        killer = killing(run, before + 20, "MegatronTrainRayActor")
        again = limi("train", *words)
        killer.join(5)
        text = again.stdout + again.stderr
        assert "going on from" in text and "retry 1 of 3" in text, text
        assert "tokens/s" in text, "the job's log was streamed"
        # slime's Python has no SGLang: the job trains and exports, and the sanity check cannot start its server.
        assert "GB/s" in text and "SGLang" in text, text
        lines = [m["step"] for m in metrics.read_metrics(run / metrics.NAME) if "loss" in m]
        assert lines == list(range(1, 201))
        assert not psutil.wait_procs(of_run(run), timeout=60)[1]


@pytest.mark.slow
def test_a_lost_node_is_said_awaited_and_then_ends_the_run(tmp_path):
    on_cpu()
    home, root = tmp_path / "home", tmp_path / "shared"
    home.mkdir()
    given = {name: os.environ[name] for name in ("SLIME_ROOT", "MEGATRON_ROOT")}
    python = os.environ["SLIME_PYTHON"]
    with ray_cluster(home, nodes=2, cpus=4, gpus=1, python=python, SLIME_PYTHON=python, **given) as cluster:
        words = [
            *WORDS,
            "run=lost",
            "engine.node_timeout=15",
            f"cluster.root={root}",
            f"cluster.address={cluster.address}",
        ]
        said: list = []
        command = threading.Thread(target=lambda: said.append(limi("train", *words)))
        command.start()
        wait_for(root / "runs" / "lost", 25)
        raylets = [p for p in psutil.process_iter() if "raylet/raylet" in " ".join(cmdline(p))]
        worker = next(
            p for p in raylets if "--head" not in " ".join(cmdline(p.parent())) and cluster.env["HOME"] == home_of(p)
        )
        worker.kill()
        started = time.monotonic()
        command.join(240)
        text = said[0].stdout + said[0].stderr
        assert said[0].returncode == 1, text
        assert (
            "1 of 2 nodes with 1 GPUs are in the cluster" in text and "waiting for engine.node_timeout=15 s" in text
        ), text
        assert "for engine.node_timeout=15 s; start Ray there again" in text, text
        assert time.monotonic() - started < 200
        assert not psutil.wait_procs(of_run(root / "runs" / "lost"), timeout=60)[1]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def home_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("HOME")
    except psutil.Error:
        return None
