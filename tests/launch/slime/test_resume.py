"""slime through failures: what goes on from a checkpoint repeats the uninterrupted run, and nothing is left running."""

import io
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.slime import engine
from launch.weights.torch_dist import holds_optimizer
from recipes.errors import ConfigError, TrainError
from tests.launch.slime.support import on_cpu
from tests.launch.support import finish, limi, metrics_of, recipe_of, start, wait_for_step

WORDS = ["engine=slime", "optim.epochs=2", "engine.save_steps=4", "optim.eval_steps=5", "engine.keep_last=10"]


def plan_of(root: Path, run: str, *words: str) -> Plan:
    on_cpu()
    return Plan(*recipe_of(root, *WORDS, f"run={run}", *words))


def train(plan: Plan) -> tuple[Path, str]:
    said = io.StringIO()
    return engine.train_through_slime(
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


@pytest.mark.contract
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


@pytest.mark.contract
@pytest.mark.slow
def test_after_the_command_itself_was_killed_it_goes_on_and_nothing_is_left(root, uninterrupted):
    plan = plan_of(root, "slime-command")
    run, words = folder(plan), [*WORDS, "run=slime-command"]
    process = start(root, *words)
    wait_for_step(run, 6, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(of_run(run), timeout=20)  # all but a writer of Megatron's that waits for its trainer
    status, said = finish(start(root, *words))
    assert status == 0, said
    assert "going on from" in said
    assert figures(run) == figures(uninterrupted)
    assert not psutil.wait_procs(of_run(run), timeout=20)[1]


@pytest.mark.contract
@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["SIGTERM", "SIGTERM of the group"])
def test_sigterm_saves_after_the_step_and_the_run_goes_on_exactly(root, uninterrupted, send):
    plan = plan_of(root, f"slime-ended-by-{send.__name__}")
    words = [w for w in WORDS if not w.startswith("engine.save_steps=")] + [f"run=slime-ended-by-{send.__name__}"]
    run, words = folder(plan), [*words, "engine.save_steps=100"]  # whatever is saved was asked for by the signal
    process = start(root, *words)
    wait_for_step(run, 5, process)
    send(process.pid, signal.SIGTERM)
    status, said = finish(process)
    assert status == 0, said
    stopped = re.search(r"SIGTERM: saved after step (\d+) of 10; run the same command", said)
    assert stopped and 5 <= int(stopped[1]) < 10, said
    assert "slime saves after step" in said and "If it is killed before, the run goes on from its base" in said
    assert not psutil.wait_procs(of_run(run), timeout=20)[1]
    status, said = finish(start(root, *words))
    assert status == 0, said
    assert f"iter_{int(stopped[1]) - 1:07}" in said, said
    assert figures(run) == figures(uninterrupted)
    assert not holds_optimizer(max((run / "checkpoints").glob("iter_*"))), "of the last step"


@pytest.mark.contract
@pytest.mark.slow
def test_weights_alone_are_exported_and_not_gone_on_from(root):
    words = [*WORDS, "run=slime-weights", "engine.save=weights"]
    process = start(root, *words)
    plan = plan_of(root, "slime-weights", "engine.save=weights")
    wait_for_step(folder(plan), 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(holds_optimizer(c.parent) for c in folder(plan).glob("checkpoints/iter_*/limi.json"))
    with pytest.raises(ConfigError, match="holds weights alone, as engine.save=weights writes them") as raised:
        train(plan)
    assert "STEP=4" in raised.value.fix and "anew=true engine.save=full" in raised.value.fix
    done = limi("export", f"cluster.root={root}", "run=slime-weights", "step=4")
    assert done.returncode == 0, done.stderr


@pytest.mark.contract
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
