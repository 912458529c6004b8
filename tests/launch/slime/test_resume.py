"""slime through failures: what goes on from a checkpoint repeats the uninterrupted run, and nothing is left running."""

import io
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch import metrics
from launch.plan import Plan
from launch.run_folder import RunFolder
from launch.slime import checkpoints, engine
from recipes.errors import TrainError
from tests.launch.slime.support import on_cpu
from tests.launch.support import finish, metrics_of, recipe_of, start, wait_for_step

WORDS = ["engine=slime", "optim.epochs=2", "engine.save_steps=4", "optim.eval_steps=5", "engine.keep_last=10"]


def plan_of(root: Path, run: str, *words: str) -> Plan:
    on_cpu()
    return Plan(*recipe_of(root, *WORDS, f"run={run}", *words))


def train(plan: Plan) -> tuple[Path, str]:
    said = io.StringIO()
    return engine.train(
        plan, RunFolder(plan.recipe, plan.data, plan.heldout), Console(file=said, soft_wrap=True)
    ), said.getvalue()


def folder(plan: Plan) -> Path:
    return Path(plan.recipe.cluster.root) / "runs" / plan.recipe.run


def figures(run: Path) -> list[dict]:
    return sorted(metrics_of(run), key=lambda line: (line["step"], "heldout_loss" in line))


def of_run(run: Path) -> list[psutil.Process]:
    """Every process whose environment names the run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LIMI_RUN") == str(run):
                found.append(process)
        except psutil.Error:
            continue
    return found


def killing(run: Path, step: int, name: str) -> threading.Thread:
    """Kills a process of the run whose title holds `name` once the metrics reach a step."""

    def wait() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if (run / metrics.NAME).exists() and metrics.completed(run) >= step:
                victim = next(p for p in of_run(run) if name in " ".join(p.cmdline()))
                victim.send_signal(signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def uninterrupted(root):
    plan = plan_of(root, "slime-uninterrupted")
    train(plan)
    return folder(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MegatronTrainRayActor", "RolloutManager"])
def test_a_killed_process_is_survived_by_a_retry_that_repeats_the_run(root, uninterrupted, name):
    plan = plan_of(root, f"slime-killed-{name.lower()}")
    run = folder(plan)
    killer = killing(run, 6, name)
    checkpoint, said = train(plan)
    killer.join(5)
    assert "retry 1 of 3" in said and "going on from" in said, said
    assert figures(run) == figures(uninterrupted)
    assert checkpoint.name == "iter_0000009"
    assert not psutil.wait_procs(of_run(run), timeout=20)[1]


@pytest.mark.slow
def test_after_the_command_itself_was_killed_it_goes_on_and_nothing_is_left(root, uninterrupted):
    plan = plan_of(root, "slime-command")
    run, words = folder(plan), [*WORDS, "run=slime-command"]
    process = start(root, *words)
    wait_for_step(run, 6, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(of_run(run), timeout=60)[1]
    status, said = finish(start(root, *words))
    assert status == 0, said
    assert "going on from" in said
    assert figures(run) == figures(uninterrupted)


@pytest.mark.slow
def test_it_goes_on_with_other_data_parallelism(root, uninterrupted):
    plan = plan_of(root, "slime-relayout")
    run = folder(plan)
    killer = killing(run, 6, "MegatronTrainRayActor")
    with pytest.raises(TrainError):
        train(plan_of(root, "slime-relayout", "engine.max_retries=0"))
    killer.join(5)
    _, said = train(plan_of(root, "slime-relayout", "cluster.gpus_per_node=1"))
    assert "going on from" in said
    for ours, theirs in zip(figures(run), figures(uninterrupted), strict=True):
        assert ours.get("lr") == theirs.get("lr")
        name = "loss" if "loss" in ours else "heldout_loss"
        assert ours[name] == pytest.approx(theirs[name], abs=1e-2)


def test_only_whole_checkpoints_count(root, tmp_path):
    recipe, data, heldout = recipe_of(root, "engine=slime", f"cluster.root={tmp_path}", "engine.keep_last=2")
    run = RunFolder(recipe, data, heldout)
    run.open()
    folders = [run.root / "checkpoints" / f"iter_{i:07}" for i in (3, 7, 11, 15)]
    for each in folders:
        each.mkdir(parents=True)
        (each / "__0_0.distcp").write_bytes(b"weights")
    assert run.checkpoints() == []
    tracker = run.root / "checkpoints" / checkpoints.TRACKER
    tracker.write_text("")  # Megatron is about to write it
    checkpoints.settle(run)
    assert run.checkpoints() == []
    tracker.write_text("11")
    checkpoints.settle(run)
    assert run.checkpoints() == folders[1:3], "keep_last=2 of three"
    assert run.checkpoint(12) == folders[2]
    checkpoints.remove_parts(run)
    assert not folders[3].exists()
    (folders[2] / "__0_0.distcp").write_bytes(b"cut")
    completed, last, said = run.open()
    assert (completed, last) == (8, folders[1]) and "is damaged" in str(said)
    assert checkpoints.go_on_from(run, last) == str(run.root / "checkpoints")
    assert tracker.read_text() == "7"
    assert checkpoints.go_on_from(run, None) == recipe.model.checkpoint
    assert not tracker.exists()
