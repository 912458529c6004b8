"""slime through failures: what goes on from a checkpoint repeats the uninterrupted run, and nothing is left running."""

import errno
import io
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.run.which_run import pick
from launch.slime import checkpoints, engine, job
from launch.slime.watch import Lines
from launch.weights.torch_dist import holds_optimizer
from recipes.errors import ConfigError, PreflightError, TrainError
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


def begun(tmp_path, root, *words: str) -> RunFolder:
    recipe, data, heldout = recipe_of(root, "engine=slime", f"cluster.root={tmp_path}", *words)
    return RunFolder(recipe, data, heldout)


def written(run: RunFolder, iteration: int) -> Path:
    """A checkpoint as Megatron leaves it."""
    made = run.root / "checkpoints" / f"iter_{iteration:07}"
    made.mkdir(parents=True)
    (made / ".metadata").write_bytes(b"weights")
    return made


def at(run: RunFolder) -> tuple[int, Path | None, str | None]:
    """A start of slime, up to slime itself."""
    found = run.open(lambda: checkpoints.remove_parts(run))
    checkpoints.go_on_from(run, found[1])
    return found


def test_a_second_command_touches_nothing_of_the_first(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    saving = written(first, 3)
    with pytest.raises(PreflightError, match="is being trained by another process"):
        at(begun(tmp_path, root))
    assert saving.exists(), "the save that is in progress"


def test_a_whole_checkpoint_that_was_not_recorded_counts_for_its_own_recipe_only(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    whole, part = written(first, 3), written(first, 7)
    (whole.parent / checkpoints.TRACKER).write_text("3")
    first._lock.close()  # killed
    with pytest.raises(ConfigError, match=r"optim\.lr=.* there, 0\.5 here"):
        at(begun(tmp_path, root, "optim.lr=0.5"))
    assert whole.exists() and part.exists()
    completed, last, _ = at(begun(tmp_path, root))
    assert (completed, last) == (4, whole)
    assert not part.exists()


def test_what_a_killed_write_left_beside_the_checkpoints_does_not_end_the_next_start(root, tmp_path):
    first = begun(tmp_path, root)
    at(first)
    scratch = first.root / "checkpoints" / f".{checkpoints.TRACKER}.4711"
    scratch.write_text("3")
    first._lock.close()
    assert at(begun(tmp_path, root))[0] == 0
    assert not scratch.exists()


@pytest.mark.parametrize("text", ["", "99", None])
def test_checkpoints_that_were_recorded_are_found_whatever_the_tracker_says(root, tmp_path, text):
    run = begun(tmp_path, root)
    at(run)
    whole = written(run, 3)
    tracker = whole.parent / checkpoints.TRACKER
    tracker.write_text("3")
    checkpoints.settle(run)
    tracker.unlink()
    if text is not None:
        tracker.write_text(text)
    assert pick(run.root, None) == (4, whole)
    run._lock.close()
    assert at(begun(tmp_path, root))[:2] == (4, whole)
    assert tracker.read_text() == "3", "what Megatron will load"


def test_a_folder_that_cannot_be_emptied_does_not_end_training(root, tmp_path, monkeypatch):
    run = begun(tmp_path, root, "engine.keep_last=1")
    at(run)
    older, newer = written(run, 3), written(run, 7)
    (older.parent / checkpoints.TRACKER).write_text("7")
    rmdir = os.rmdir

    def busy(path, **kwargs):  # as NFS, which keeps a removed file that is open as `.nfs…`
        if "iter_0000003" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        rmdir(path, **kwargs)

    monkeypatch.setattr(os, "rmdir", busy)
    checkpoints.settle(run)
    assert run.checkpoints() == [newer]


def test_lines_are_shown_once_they_are_whole(tmp_path):
    path = tmp_path / metrics.NAME
    path.write_bytes(b'{"step": 1}\n')
    lines = Lines(path)
    assert lines.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(12) + b'\n{"step')  # as NFS may show it
    assert lines.read() == [{"step": 2}]
    assert lines.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 33}\n{"step": 4}\n')
    assert lines.read() == [{"step": 33}, {"step": 4}]


@pytest.mark.run
@pytest.mark.parametrize(
    ("script", "said"),
    [
        # A log that grows is no step.
        (
            "while sleep 0.2; do echo still waiting; done",
            "slime finished no step and no checkpoint for engine.timeout=2 s; raise",
        ),
        # The clock of a file server may be behind.
        (
            """for i in 1 2 3 4 5 6 7 8; do echo '{"step": '$i', "loss": 1, "grad_norm": 1, "lr": 1, "tokens": 1, "time": '"""
            """'{"step_s": 1}}' >> metrics.jsonl; touch -d '2 hours ago' metrics.jsonl; sleep 0.5; done; exit 3""",
            "status 3",
        ),
    ],
)
def test_a_run_is_alive_while_it_finishes_steps(root, tmp_path, script, said):
    run = begun(tmp_path, root, "engine.timeout=2", f"engine.python={tmp_path}/python")
    run.open()
    (run.root / "job.json").write_text('{"env_vars": {}}')
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(TrainError, match=said):
        engine.start(run.recipe, run, 0, 5, Console(file=io.StringIO()))
    assert not [p for p in psutil.Process().children() if str(tmp_path) in " ".join(p.cmdline())]


@pytest.mark.run
def test_a_start_ends_what_a_killed_start_of_this_run_left_and_nothing_else(root, tmp_path):
    run = begun(tmp_path, root, f"engine.python={tmp_path}/python")
    run.open()
    (run.root / "job.json").write_text('{"env_vars": {}}')
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    left, other = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, job.RUN: str(folder)})
        for folder in (run.root, run.root.with_name("other"))
    )
    try:
        with pytest.raises(TrainError, match="status 3"):
            engine.start(run.recipe, run, 0, 5, Console(file=io.StringIO()))
        assert left.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
