"""The sbatch script on a real Slurm of two nodes: it trains, is preempted and goes on, and saves when it is cancelled.

Pyxis cannot be installed here: a stand-in gives each container name a /tmp of its own. Not run on Pyxis itself.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch.cluster.schedulers.slurm import slurm
from launch.run import metrics
from recipes.compose.recipe import compose_recipe
from tests.launch.cluster.schedulers import slurm_here
from tests.launch.slime.support import on_cpu
from tests.launch.support import UNJUDGED, free_port

pytestmark = pytest.mark.slow

NODES = ["cluster=h100x8", "gpu=cpu", "cluster.nodes=2", "cluster.gpus_per_node=1", "engine.timeout=300"]
# Both nodes are this machine: each Ray needs ports and a folder of its own.
PYTHON = """#!/bin/bash
if [[ "$*" == *"ray.scripts.scripts start"* ]]; then
    set -- "$@" --dashboard-agent-listen-port="$(({port} + RANDOM % 2000))" --temp-dir="$(mktemp -d {folder}/rXXXX)"
fi
exec {python} "$@"
"""
# What Pyxis does for a container's /tmp: one for each name on a node, and a new one without a name.
SRUN = """#!/bin/bash
options=() name= image=
while [[ "$1" == --* ]]; do
    case "$1" in
        --container-name=*) name=${{1#*=}} ;;
        --container-image=*) image=${{1#*=}}; echo "$1" >>{folder}/images ;;
        --container-*) ;;
        *) options+=("$1") ;;
    esac
    shift
done
if [[ -n "$image$name" ]]; then
    inside='mkdir -p "$0/$SLURMD_NODENAME" && mount --bind "$0/$SLURMD_NODENAME" /tmp && exec "$@"'
    exec /usr/bin/srun "${{options[@]}}" unshare --mount bash -c "$inside" "{folder}/tmp-${{name:-$RANDOM}}" "$@"
fi
exec /usr/bin/srun "${{options[@]}}" "$@"
"""


@pytest.fixture(scope="module")
def cluster():
    """Slurm's environment with the stand-ins in front, and a folder outside /tmp."""
    if lacking := slurm_here.missing():
        pytest.skip(f"{', '.join(lacking)} not installed: Debian's slurm-wlm and munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/var/tmp"))
    try:
        with slurm_here.slurm(folder / "slurm") as env:
            (folder / "srun").write_text(SRUN.format(folder=folder))
            (folder / "srun").chmod(0o755)
            yield folder, {**env, "PATH": f"{folder}:{env['PATH']}", "HOME": str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A submitted script."""

    def __init__(self, cluster, python, *words, partition="low", **env):
        self.folder, self.env = cluster
        (self.folder / "python3").write_text(PYTHON.format(python=shlex.quote(python), port=20000, folder=self.folder))
        (self.folder / "python3").chmod(0o755)
        self.env = {**self.env, **env}
        self.root = self.folder / "root"
        recipe = compose_recipe([*NODES, f"cluster.root={self.root}", *words])
        self.run = self.root / "runs" / recipe.run
        text = slurm(recipe).replace("6379", str(free_port())).replace("8265", str(free_port()))
        (self.folder / "job.sbatch").write_text(text)
        self.id = self.slurm("sbatch", "--parsable", f"--partition={partition}", "job.sbatch").strip()
        self.log = self.folder / f"limi-{recipe.run}-{self.id}.log"

    def slurm(self, *words):
        return subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True, check=True).stdout

    def state(self):
        return re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", self.id))[1]

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, done, seconds=300):
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{self.state()}\n{self.said()[-4000:]}"
            time.sleep(0.5)

    def steps(self):
        return metrics.completed(self.run) if (self.run / metrics.NAME).exists() else 0


def nothing_is_left(folder):
    deadline = time.monotonic() + 60
    while left := subprocess.run(["pgrep", "-af", f"{folder}/root"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


ENGINES = [pytest.param("megatron", id="embedded"), pytest.param("slime", marks=pytest.mark.contract)]


def of_engine(engine):
    """The Python of the nodes, and the words of a run of this engine."""
    if engine == "megatron":
        return sys.executable, ["engine=megatron", "layout=data_parallel", "data=sample"]
    on_cpu()
    roots = [f"engine.slime_root={os.environ['SLIME_ROOT']}", f"engine.megatron_root={os.environ['MEGATRON_ROOT']}"]
    return os.environ["SLIME_PYTHON"], [
        "engine=slime",
        "engine.python=python3",
        "layout=data_parallel",
        "data=sample",
        *roots,
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_trains_on_two_nodes_each_with_one_tmp(cluster, engine):
    python, words = of_engine(engine)
    job = Job(cluster, python, *words, f"run=whole-{engine}", "optim.epochs=1", *UNJUDGED, LIMI_IMAGE="slime.sqsh")
    job.wait(lambda: job.state() not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 400)
    # slime's Python has no SGLang: the run is trained and exported, and its check cannot start a server.
    assert job.state() == ("COMPLETED" if engine == "megatron" else "FAILED"), job.said()
    assert "on 2 ranks" in job.said()
    assert (job.root / "runs" / f"whole-{engine}" / "hf" / "config.json").is_file()
    assert (job.folder / "images").read_text() == "--container-image=slime.sqsh\n" * 2, "once a node"
    (job.folder / "images").unlink()
    nothing_is_left(job.folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_preempted_job_saves_is_requeued_and_goes_on_and_a_cancelled_one_saves(cluster, engine):
    python, words = of_engine(engine)
    name = f"taken-{engine}"
    job = Job(cluster, python, *words, f"run={name}", "optim.epochs=300", "engine.save_steps=10000", *UNJUDGED)
    job.wait(lambda: job.steps() >= 3)
    other = subprocess.run(
        ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"],
        cwd=job.folder, env=job.env, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    job.wait(lambda: "SIGTERM: saved after step" in job.said(), 120)
    saved = int(re.search(r"SIGTERM: saved after step (\d+) of", job.said())[1])
    job.wait(lambda: job.state() == "PENDING", 120)
    job.slurm("scancel", other)
    job.wait(lambda: "going on from" in job.said() and job.steps() > saved + 2)
    checkpoints = job.run / "checkpoints"
    before = {p.name for p in checkpoints.iterdir()}
    job.slurm("scancel", job.id)
    job.wait(lambda: job.state() == "CANCELLED", 120)
    job.wait(lambda: {p.name for p in checkpoints.glob("[!.]*/")} - before, 60)
    nothing_is_left(job.folder)
