"""The scripts for Slurm and Kubernetes: what they ask for, and that the words arrive in the job as they were typed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from launch.cluster import schedulers
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from tests.conftest import REPO
from tests.launch.support import UNJUDGED, called, free_port
from tests.make import saying

WORDS = [
    "model=glm4.5", "run=My_Run.2", "cluster.root=/shared/a b", "data.path=/it's/[1] $HOME/`ls`/$(ls)/\"q\"/%d/{x}/\\n/ü*",
    "data.heldout=/two\nlines",
]  # fmt: skip
ADDRESS = "cluster.address=http://head:8265"

FAKE = Path(__file__).with_name("fake_limi.py")
# Slurm's commands as one machine plays them: every node is this one.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$LOG/srun.log"; shift; done
if [[ "$1" == ray && "$*" == *--head* ]]; then set -- "$@" --temp-dir "$FOLDER/0" --dashboard-agent-listen-port "$AGENT0"; fi
if [[ "$1" == ray && "$*" == *--address=* ]]; then set -- "$@" --temp-dir "$FOLDER/1" --dashboard-agent-listen-port "$AGENT1"; fi
exec "$@"
"""
SCONTROL = "#!/bin/bash\nhostname\necho other\n"
RAY = '#!/bin/bash\necho "$*" >>"$LOG/ray.log"\nexec sleep 60\n'
PYTHON = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n'


@pytest.fixture
def nodes(tmp_path):
    """The environment in which a script is run, with Slurm's commands and stand-ins for Ray and for Python in front."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "python3": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **env,
        "PATH": f"{tmp_path}:{env['PATH']}",
        "LOG": str(tmp_path),
        "SLURM_JOB_NODELIST": "x",
        "AGENT0": "",
        "AGENT1": "",
    }


def script(tmp_path, *words):
    path = tmp_path / "job.sbatch"
    path.write_text(schedulers.slurm(compose_recipe(words)))
    return path


def run(path, env):
    return subprocess.run(["bash", path], env=env, capture_output=True, text=True, timeout=60)


def test_the_script_asks_for_the_recipes_nodes(tmp_path):
    text = script(tmp_path, "model=glm4.5", "cluster.root=/shared").read_text()
    for line in ("--nodes=8", "--gpus-per-node=8", "--ntasks-per-node=1", "--exclusive", "--job-name=limi-glm4.5"):
        assert f"#SBATCH {line}\n" in text
    one = script(tmp_path, "model=qwen3-4b", "cluster.root=/shared").read_text()
    assert "#SBATCH --nodes=1\n" in one and "ray start --block --address" not in one


@pytest.mark.parametrize("words", [["model=glm4.5", "cluster.root=/shared"], WORDS])
def test_the_script_is_bash(tmp_path, words):
    path = script(tmp_path, *words)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_the_script_starts_ray_everywhere_and_hands_the_words_on_as_typed(tmp_path, nodes):
    words = [w.replace("/shared/a b", str(tmp_path / "a b")) for w in WORDS]
    path = script(tmp_path, *words, ADDRESS)
    done = run(path, nodes | {"LIMI_IMAGE": "some/image"})
    assert done.returncode == 0, done.stderr
    argv, folder = json.loads((tmp_path / "train").read_text())
    assert argv == ["launch/limi.py", "train", *words, "cluster.address=http://127.0.0.1:8265"]
    assert folder == str(REPO)
    head, workers = sorted((tmp_path / "ray.log").read_text().splitlines(), key=lambda line: "--head" not in line)
    assert "--num-gpus=8" in head and "--port=6379" in head
    assert "--num-gpus=8" in workers and re.search(r"--address=\S+:6379", workers)
    assert json.loads((tmp_path / "wait").read_text())[2:] == ["64", "3600"]
    options = (tmp_path / "srun.log").read_text().splitlines()
    assert options.count("--container-image=some/image") == 4
    assert f"--container-mounts={REPO}:{REPO},{tmp_path}/a b:{tmp_path}/a b" in options
    assert "--nodes=7" in options and "--ntasks=7" in options
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert not left


def test_the_script_ends_as_the_run_does(tmp_path, nodes):
    path = script(tmp_path, "model=qwen3-4b", f"cluster.root={tmp_path}")
    assert run(path, nodes | {"LIMI_IMAGE": "x", "STATUS": "2"}).returncode == 2


def test_slurms_signal_stops_the_run_before_the_script_ends(tmp_path, nodes):
    path = script(tmp_path, "model=qwen3-4b", "run=cut", f"cluster.root={tmp_path}")
    env = nodes | {"LIMI_IMAGE": "x", "WAIT": "1"}
    process = subprocess.Popen(["bash", path], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "train").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    argv, _ = json.loads((tmp_path / "stop").read_text())
    assert argv == ["launch/limi.py", "stop", "run=cut", "cluster.address=http://127.0.0.1:8265"]


@pytest.mark.slow
def test_the_script_trains_on_two_nodes(tmp_path, nodes):
    for name in ("ray", "python3"):
        (tmp_path / name).unlink()
    small = ["cluster=h100x8", "engine=megatron", "gpu=cpu", "cluster.nodes=2", "cluster.gpus_per_node=1"]
    root = tmp_path / "root"
    path = script(tmp_path, *small, f"cluster.root={root}", "run=by-slurm", "optim.epochs=1", *UNJUDGED)
    text = path.read_text()
    port = str(free_port())
    path.write_text(text.replace("6379", port).replace("8265", str(free_port())))
    # Both nodes are this machine: each needs a folder and a port of its own.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        env = nodes | {"AGENT0": str(free_port()), "AGENT1": str(free_port()), "FOLDER": folder, "HOME": str(tmp_path)}
        done = subprocess.run(["bash", path], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steps on 2 ranks" in done.stdout and (root / "runs" / "by-slurm" / "report.html").is_file()
    deadline = time.monotonic() + 20
    while left := subprocess.run(["pgrep", "-af", f"[:=]{port}"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def manifest(*words):
    return yaml.safe_load(schedulers.kuberay(compose_recipe(words)))


def test_the_manifest_asks_for_the_recipes_nodes_and_its_folder():
    spec = manifest(*WORDS)["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    assert [workers[k] for k in ("replicas", "minReplicas", "maxReplicas")] == [8, 8, 8]
    (worker,) = workers["template"]["spec"]["containers"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    for container in (head, worker):
        assert container["image"] == "slimerl/slime"
        assert {m["mountPath"] for m in container["volumeMounts"]} == {"/shared/a b", "/dev/shm"}
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_the_manifests_entry_point_hands_the_words_on_as_typed(tmp_path):
    entrypoint = manifest(*WORDS, ADDRESS)["spec"]["entrypoint"]
    saying(tmp_path / "python3")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(entrypoint, shell=True, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["/shared/a b/checkout/launch/limi.py", "train", *WORDS]


@pytest.mark.parametrize("name", ["A" * 100, "1.2_3", "-x-"])
def test_the_manifests_name_is_kubernetes(name):
    made = manifest("model=qwen3-4b", "cluster.root=/shared", f"run={name}")
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", made["metadata"]["name"])
    assert made["spec"]["metadata"]["limi_run"] == name


@pytest.mark.parametrize("stage", [schedulers.slurm, schedulers.kuberay])
@pytest.mark.parametrize(
    ("words", "says"),
    [(["cluster.root=/x"], "write cluster=h100x8"), (["cluster=h100x8"], "write cluster.root=FOLDER")],
)
def test_what_no_scheduler_can_run_is_refused(stage, words, says):
    with pytest.raises(ConfigError, match=says):
        stage(compose_recipe(words))


@pytest.mark.parametrize(("stage", "first"), [("slurm", "#!/bin/bash\n"), ("kuberay", "# For `kubectl apply -f`")])
def test_only_the_script_is_printed(stage, first):
    words = ["model=glm4.5", "cluster.root=/shared"]
    done = called(stage, *words)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout == getattr(schedulers, stage)(compose_recipe(words)) and done.stdout.startswith(first)
