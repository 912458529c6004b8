"""The sbatch script: what it asks for, that the words arrive in the job as typed, and that signals stop the run before it ends."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cluster.schedulers.slurm import BODY, slurm
from recipes.compose.recipe import compose_recipe
from recipes.paths import REPO
from tests.launch.support import called

WORDS = [
    "model=glm4.5", "run=My_Run.2", "cluster.root=/shared/a b", "data.path=/it's/[1] $HOME/`ls`/$(ls)/\"q\"/%d/{x}/\\n/ü*",
    "data.heldout=/two\nlines",
]  # fmt: skip
ADDRESS = "cluster.address=http://head:8265"

FAKE = Path(__file__).with_name("fake_limi.py")
# Slurm's commands as one machine plays them: every node is this one.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$LOG/srun.log"; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    requeue*) echo "$2" >>"$LOG/requeued" ;;
    "show node") echo "   NodeAddr=$(hostname) NodeHostName=x" ;;
    *) hostname; echo other ;;
esac
"""
PYTHON = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n'


@pytest.fixture
def nodes(tmp_path):
    """The environment in which a script is run, with stand-ins for Slurm's commands and for Python in front."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python3": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "LIMI_IMAGE"))}
    slurms = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "17", "SLURM_CPUS_ON_NODE": "96"}
    return {**env, **slurms, "PATH": f"{tmp_path}:{env['PATH']}", "LOG": str(tmp_path)}


def script(tmp_path, *words):
    path = tmp_path / "job.sbatch"
    path.write_text(slurm(compose_recipe([*words, "engine.python=python3"])))
    return path


def run(path, env):
    return subprocess.run(["bash", path], env=env, capture_output=True, text=True, timeout=60)


def left_of(tmp_path):
    return subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout


def test_the_script_asks_for_the_recipes_nodes_whole(tmp_path):
    text = script(tmp_path, "model=glm4.5", "cluster.root=/shared").read_text()
    for line in (
        "--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=1", "--exclusive", "--mem=0", "--requeue", "--job-name=limi-glm4.5",
        "--output=limi-glm4.5-%j.log", "--open-mode=append", "--signal=B:USR1@600",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    assert "slimerl/slime:nightly-dev-20260810a-cu129" in text, "an image that exists, by its tag"
    assert "gpus-per-node" not in slurm(
        compose_recipe(["cluster=h100x8", "gpu=cpu", "engine=megatron", "cluster.root=/x"])
    )


def test_slurm_s_signal_leaves_time_for_a_step_and_a_save():
    recipe = compose_recipe(["model=glm4.5", "cluster.root=/shared"])
    assert "#SBATCH --signal=B:USR1@600\n" in slurm(recipe, 100)
    assert "#SBATCH --signal=B:USR1@1500\n" in slurm(recipe, 1000)


@pytest.mark.parametrize("words", [["model=glm4.5", "cluster.root=/shared"], WORDS])
def test_the_script_is_bash(tmp_path, words):
    path = script(tmp_path, *words)
    subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_finds_nothing(tmp_path):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", script(tmp_path, *WORDS)], check=True)


def test_every_node_has_one_step_and_the_words_arrive_as_typed(tmp_path, nodes):
    words = [w.replace("/shared/a b", str(tmp_path / "a b")) for w in WORDS]
    path = script(tmp_path, *words, ADDRESS)
    done = run(path, nodes | {"LIMI_IMAGE": "some/image"})
    assert done.returncode == 0, done.stderr
    argv, folder = json.loads((tmp_path / "train").read_text())
    given = [*words, "engine.python=python3", "cluster.address=http://127.0.0.1:8265"]
    assert argv == ["launch/limi.py", "train", *given]
    assert folder == str(REPO)
    head, worker = sorted((tmp_path / "ray.log").read_text().splitlines(), key=lambda line: "--head" not in line)
    assert "--num-gpus=8" in head and "--port=6379" in head
    assert "--num-gpus=8" in worker and re.search(r"--address=\S+:6379", worker)
    assert json.loads((tmp_path / "wait").read_text())[2:] == ["64", "3600"]
    options = (tmp_path / "srun.log").read_text().splitlines()
    assert options.count("--container-image=some/image") == 2, "one step, and one import, a node"
    assert options.count("--container-name=limi-17") == 2
    assert f"--container-mounts={REPO}:{REPO},{tmp_path}/a b:{tmp_path}/a b" in options
    assert {"--nodes=7", "--ntasks=7", "--cpus-per-task=96", "--cpu-bind=none"} <= {*options}
    assert not left_of(tmp_path)


def test_without_an_image_there_is_no_container_and_the_checkout_s_environment_is_not_used(tmp_path, nodes):
    path = script(tmp_path, "model=qwen3-4b", f"cluster.root={tmp_path}")
    assert run(path, nodes).returncode == 0
    assert "container" not in (tmp_path / "srun.log").read_text()
    assert ".venv" not in BODY.read_text()


def test_the_script_ends_as_the_run_does(tmp_path, nodes):
    path = script(tmp_path, "model=qwen3-4b", f"cluster.root={tmp_path}")
    assert run(path, nodes | {"STATUS": "2"}).returncode == 2
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("sign", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_slurms_signals_stop_the_run_and_the_time_limits_requeues_it(tmp_path, nodes, sign, requeued):
    path = script(tmp_path, "model=glm4.5", "run=cut", f"cluster.root={tmp_path}")
    process = subprocess.Popen(
        ["bash", path], env=nodes | {"WAIT": "1", "STATUS": "130"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "train").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sign)
    assert process.wait(30) == 130
    argv, _ = json.loads((tmp_path / "stop").read_text())
    assert argv == ["launch/limi.py", "stop", "run=cut", "cluster.address=http://127.0.0.1:8265"]
    assert (tmp_path / "requeued").exists() == requeued
    assert not left_of(tmp_path)


def test_a_node_that_ends_early_ends_the_job(tmp_path, nodes):
    path = script(tmp_path, "model=glm4.5", "run=lost", f"cluster.root={tmp_path}")
    done = run(path, nodes | {"WAIT": "1", "STATUS": "130", "LOSE": "1"})
    assert done.returncode == 1
    assert "a node of x has ended its part" in done.stderr
    assert (tmp_path / "stop").exists() and not (tmp_path / "requeued").exists()
    assert not left_of(tmp_path)


def test_only_the_script_is_printed():
    done = called("slurm", "model=glm4.5", "cluster.root=/shared")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=limi-glm4.5\n")
    assert done.stdout.endswith(BODY.read_text())
