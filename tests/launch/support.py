"""What tests of training share: recipes with their data, and steps on real ranks."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from rich.console import Console

from data_prep.files import whole_folder
from data_prep.pack.dataset import Dataset, prepare
from launch.export import export
from launch.limi import main
from launch.megatron.ranks import Pool, Ranks
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.serving.silence import Silence
from launch.weights import hf_folder, tiny
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.schedule.schedule import MicroBatch, Schedule
from tests.conftest import REPO

# Words of a run that has learnt nothing, whose sanity check looks at the way and not at the model.
UNJUDGED = ["sanity.min_tool_calls=0", "sanity.min_finished=0", "sanity.min_well_formed=0", "sanity.prompts=8"]


def recipe_of(root: Path, *words: str) -> tuple[Recipe, Dataset, Dataset]:
    """The recipe with its tiny base made and its two data sets packed under `root`."""
    recipe = compose_recipe([f"cluster.root={root}", *words])
    tiny.make(recipe)
    return recipe, prepare(recipe, recipe.data.path), prepare(recipe, str(recipe.data.heldout))


@contextlib.contextmanager
def ranks_of(root: Path, *words: str) -> Iterator[tuple[Plan, Ranks]]:
    """Real ranks with the recipe's model loaded."""
    plan = Plan(*recipe_of(root, *words))
    with POOL.ranks(plan) as ranks:
        yield plan, ranks


def short_run(root: Path, steps: int, *words: str) -> tuple[Plan, RunFolder]:
    """A run of a few steps on real ranks, its checkpoint saved and `hf/` exported by the ranks."""
    with ranks_of(root, *words) as (plan, ranks):
        run = RunFolder(plan.recipe, plan.data, plan.heldout)
        for step in range(steps):
            ranks.call("train_step", step)
        earlier = run.root / "checkpoints" / f"step_{steps:06}"  # of a run of this name before
        shutil.rmtree(earlier, ignore_errors=True)
        with run.new_checkpoint(steps) as folder:
            ranks.call("save", str(folder), steps)
        saved = run.checkpoint(steps)
        assert saved is not None
        shutil.rmtree(run.hf, ignore_errors=True)
        with whole_folder(run.hf) as scratch:
            files = {name: file for written in ranks.call("export", str(scratch)) for name, file in written.items()}
            hf_folder.finish(scratch, files, plan.recipe.model, saved.name)
    return plan, run


def exported(plan: Plan, ranks: Ranks, target: Path, steps: int = 1) -> Path:
    """`target`, the export of a checkpoint after so many steps."""
    for step in range(steps):
        ranks.call("train_step", step)
    checkpoint = target.with_name(f"step_{steps:06}")
    checkpoint.mkdir(parents=True)
    ranks.call("save", str(checkpoint), steps)
    export.export_checkpoint(plan.recipe, checkpoint, target, Console(quiet=True))
    return target


@dataclass(frozen=True)
class OneByOne(Schedule):
    """The same steps on one rank, each sequence a micro-batch of its own."""

    def assign(self, sequences: Sequence[int]) -> tuple[tuple[MicroBatch, ...], ...]:
        return (tuple((s,) for s in sequences),)


def limi(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line, as a user types it."""
    return while_it_moves([sys.executable, "launch/limi.py", *words], **kwargs)


def while_it_moves(
    command: Sequence[str], hangs_after: float = 300.0, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command from the checkout, however long a busy machine takes for it. One that takes none of the processors' time for so
    many seconds hangs: it is ended, with what it started."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process, hung = subprocess.Popen(command, cwd=REPO, stdout=out, stderr=err, text=True, **kwargs), False
        quiet = Silence(lambda: _tenths(process.pid))
        while process.poll() is None:
            if hung := quiet.seconds() > hangs_after:
                for one in [*descendants(process.pid), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read())
    assert not hung, f"{command} hung: {said}"
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _tenths(pid: int) -> int:
    """Of seconds of the processors' time, by a process and what it started."""
    seconds = 0.0
    with contextlib.suppress(psutil.Error):
        for one in [psutil.Process(pid), *descendants(pid)]:
            times = one.cpu_times()
            seconds += times.user + times.system
    return int(10 * seconds)


def called(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command line called in this process, where a process of its own shows nothing more: for what ends before ranks, a server
    or a job are started. env: its whole environment."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with (
        mock.patch.dict(os.environ, env or {}, clear=env is not None),
        mock.patch("launch.cli.terminal.streams", contextlib.nullcontext),  # which wants files
        contextlib.chdir(REPO),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main([*words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(["launch/limi.py", *words], status, out.getvalue(), err.getvalue())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without their timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


POOL = Pool()  # of the test process; conftest.py closes it
SHORT = ["optim.epochs=4", "engine.save_steps=6", "optim.eval_steps=5", "engine.keep_last=10"]


def start(root: Path, *words: str) -> subprocess.Popen[str]:
    """Training without the sanity check, 20 short steps unless the words say otherwise, as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "tests/launch/train_only.py", f"cluster.root={root}", *SHORT, *words],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, SIGINT is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and what it wrote."""
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the run's metrics reach a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(line["step"] >= step for line in metrics_of(run)):
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {finish(process)}")


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def alive(processes: list[psutil.Process], patience: float = 15.0) -> list[psutil.Process]:
    """Those that still run after `patience` seconds. A zombie does not: it waits for whoever its parent is now."""
    deadline, left = time.monotonic() + patience, processes
    while (left := [p for p in left if _runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of a test's own."""

    address: str  # of its dashboard
    env: dict[str, str]  # that its nodes were started with, with a folder of its own as HOME

    @property
    def home(self) -> Path:
        return Path(self.env["HOME"])


@contextlib.contextmanager
def ray_cluster(
    home: Path, nodes: int = 1, cpus: int = 2, gpus: int = 0, python: str = sys.executable, **more: str
) -> Iterator[Cluster]:
    """Nodes on this machine, started as a user does, with the environment of `python` first on their PATH; `more` is added to it.
    gpus: that each node says it has."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = f"{Path(python).parent}:{env['PATH']}"
    env |= {"PATH": path, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", **more}
    port, dashboard = free_port(), free_port()
    started: list[psutil.Process] = []
    log = (home / "ray.log").open("w")
    # Folders of their own: in a shared one a job finds whatever Ray was started last on this machine, and a node puts a job's
    # files there anew, under the running job. Short names: the sockets inside have 107 characters at most.
    folders = [tempfile.mkdtemp(prefix="ray") for _ in range(nodes)]

    def start_node(*words: str) -> None:
        command = [
            str(Path(python).parent / "ray"), "start", "--block", "--num-cpus", str(cpus), "--num-gpus", str(gpus),
            "--dashboard-agent-listen-port", str(free_port()),
        ]  # fmt: skip
        process = subprocess.Popen([*command, *words], env=env, stdout=log, stderr=log, start_new_session=True)
        started.append(psutil.Process(process.pid))

    try:
        start_node("--head", "--port", str(port), "--dashboard-port", str(dashboard), "--temp-dir", folders[0])
        _answers(dashboard)
        for folder in folders[1:]:
            start_node("--address", f"127.0.0.1:{port}", "--temp-dir", folder)
        yield Cluster(f"http://127.0.0.1:{dashboard}", env)
    finally:
        left = [p for node in started for p in (node, *descendants(node.pid))]
        for sign in (signal.SIGTERM, signal.SIGKILL):  # some of Ray's servers outlive SIGTERM
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sign)
            left = alive(left, 5)
        log.close()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> None:
    """Waits until something listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")
