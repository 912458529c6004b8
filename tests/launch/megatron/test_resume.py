"""Interrupted runs go on as if nothing had happened, and what fails leaves no process and no half checkpoint."""

import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from data_prep.files import sha256
from tests.launch import faulty
from tests.launch.support import alive, descendants, finish, metrics_of, ranks_of, start, wait_for_step


def rank_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray names an actor's process after its class, whatever Ray itself has become a child of."""
    found = [p for p in descendants(process.pid) if "ray::Worker" in " ".join(p.cmdline())]
    assert len(found) == 2, found
    return found


@pytest.mark.run
def test_a_killed_rank_ends_the_run_cleanly_and_it_resumes_exactly(root, uninterrupted):
    run = root / "runs" / "killed"
    process = start(root, "run=killed", "engine.max_retries=0")
    wait_for_step(run, 8, process)
    children = descendants(process.pid)
    rank_processes(process)[1].send_signal(signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    assert re.search(r"TrainError: rank \d died in ", output) and "engine.max_retries=0 are used up" in output
    assert not alive(children)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000006"]
    code, output = finish(start(root, "run=killed"))
    assert code == 0, output
    assert "going on from" in output
    assert metrics_of(run) == uninterrupted, "bit for bit"


@pytest.mark.slow
def test_a_hanging_rank_is_noticed_and_the_run_starts_again_by_itself(root, uninterrupted):
    run = root / "runs" / "hanging"
    process = start(root, "run=hanging", "engine.timeout=20")
    wait_for_step(run, 8, process)
    stopped = rank_processes(process)[0]
    stopped.suspend()
    sent = time.monotonic()
    code, output = finish(process)
    assert code == 0, output
    assert "did not finish 'train_step' within engine.timeout=20 s" in output and "retry 1 of 3" in output
    assert "going on from" in output and "step_000006" in output
    assert time.monotonic() - sent < 90
    assert not alive([stopped])
    assert metrics_of(run) == uninterrupted, "bit for bit"


@pytest.mark.slow
def test_what_fails_twice_alike_is_not_tried_a_third_time(root):
    code, output = finish(start(root, "run=twice", "engine.timeout=1"))
    assert code == 1, output
    assert output.count("did not finish 'start' within engine.timeout=1 s") == 2, output
    assert "retry 1 of 3" in output and "retry 2" not in output
    assert "Failed twice with the same error after step" in output


@pytest.mark.slow
def test_the_same_recipe_twice_gives_the_same_metrics_and_the_same_bytes(root, uninterrupted):
    code, output = finish(start(root, "run=alike"))
    assert code == 0, output
    assert metrics_of(root / "runs" / "alike") == uninterrupted, "bit for bit"
    whole, again = (sorted((root / "runs" / name / "hf").iterdir()) for name in ("whole", "alike"))
    assert [p.name for p in whole] == [p.name for p in again]
    assert [sha256(p) for p in whole] == [sha256(p) for p in again]


@pytest.mark.parametrize(
    ("sign", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg), (signal.SIGHUP, os.killpg)],
    ids=["SIGTERM", "SIGTERM of the group", "SIGHUP of the group"],
)
@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on_exactly(root, uninterrupted, sign, send):
    """`timeout` and `make` send SIGTERM to the whole process group, a closed terminal SIGHUP."""
    name = f"ended-by-{sign.name}-{send.__name__}"
    run = root / "runs" / name
    process = start(root, f"run={name}")
    wait_for_step(run, 8, process)
    children = descendants(process.pid)
    sent = time.monotonic()
    send(process.pid, sign)
    code, output = finish(process)
    assert code == 0, output
    assert time.monotonic() - sent < 30, "the usual grace of a scheduler"
    assert not alive(children)
    newest = max(p.name for p in (run / "checkpoints").iterdir())
    assert newest > "step_000006"
    assert f"{sign.name}: saved after step {int(newest[-6:])} of" in output
    code, output = finish(start(root, f"run={name}"))
    assert code == 0, output
    assert newest in output
    assert metrics_of(run) == uninterrupted, "bit for bit"


@pytest.mark.slow
def test_a_truncated_checkpoint_is_noticed_and_the_one_before_it_goes_on_exactly(root, uninterrupted):
    run = root / "runs" / "truncated"
    process = start(root, "run=truncated")
    wait_for_step(run, 14, process)
    process.send_signal(signal.SIGINT)
    finish(process)
    newest = run / "checkpoints" / "step_000012"
    largest = max(newest.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    code, output = finish(start(root, "run=truncated"))
    assert code == 0, output
    assert "step_000012 is damaged" in output and "step_000006" in output
    assert metrics_of(run) == uninterrupted, "bit for bit"


@pytest.mark.slow
def test_one_step_tensor_for_all_parameters_goes_on_wrongly(root, tmp_path, monkeypatch):
    """What Megatron's own load leaves: the first loss after it does not show it."""
    words = ["model=qwen3-tiny", "cluster.gpus_per_node=1", "optim.warmup_steps=0"]

    def losses(ranks):
        return [ranks.call("train_step", step)[0]["loss"] for step in range(2, 5)]

    def resumed():
        with ranks_of(root, *words) as (_, ranks):
            assert ranks.call("load", str(tmp_path)) == [2]
            return losses(ranks)

    with ranks_of(root, *words) as (_, ranks):
        for step in range(2):
            ranks.call("train_step", step)
        ranks.call("save", str(tmp_path), 2)
        uninterrupted = losses(ranks)
    assert resumed() == uninterrupted, "bit for bit"
    monkeypatch.setattr("launch.megatron.ranks.Worker", faulty.SharedStep)
    wrong = resumed()
    assert wrong[0] == uninterrupted[0]
    assert abs(wrong[1] - uninterrupted[1]) > 1e-2, (wrong, uninterrupted)


@pytest.mark.run
def test_an_interruption_ends_everything_that_was_started(root):
    process = start(root, "run=interrupted")
    wait_for_step(root / "runs" / "interrupted", 2, process)
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "goes on from what is whole" in output
    assert not alive(children)


@pytest.mark.slow
def test_a_run_that_is_going_on_is_left_alone(root):
    process = start(root, "run=busy")
    wait_for_step(root / "runs" / "busy", 1, process)
    code, output = finish(start(root, "run=busy"))
    assert code == 2
    assert "run=busy is being trained by another process" in output
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


@pytest.mark.run
def test_an_unfinished_run_of_another_recipe_is_refused(root, uninterrupted):
    code, output = finish(start(root, "run=whole", "optim.lr=1e-4"))
    assert code == 2
    assert "optim.lr=" in output
    assert "run=OTHER" in output
