"""The checks of the cluster: what they make of a node's report, and on real Ray nodes of this machine."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile

import pytest
from rich.console import Console

from launch.checks import Outcome
from launch.cluster.image.pins import MEGATRON
from launch.preflight import cluster_checks
from launch.slime import job
from recipes.compose.recipe import compose_recipe
from tests.conftest import REPO
from tests.launch.slime.support import pinned
from tests.launch.support import POOL, recipe_of, while_it_moves

CPU = compose_recipe(["engine=slime", "cluster.nodes=2"])

GPUS = compose_recipe(
    ["engine=slime", "gpu=h100", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.network_gb_s=50"]
)


def speed(r, name, gb_s):
    return cluster_checks.exchange(name)(r, {name: gb_s * 1e9}, name)


def test_a_network_below_half_its_speed_is_refused():
    """All-reduce: 2 x 15/16 of a message crosses from node to node, once for eight GPUs; all-to-all: 8/16 of it for each GPU."""
    row = speed(GPUS, "all-reduce", 110)
    assert row.figure == "206 GB/s on the bus of 16 ranks, 25.8 GB/s between nodes for each GPU" and not row.failed
    assert speed(GPUS, "all-reduce", 100).failed
    assert not speed(GPUS, "all-to-all", 51).failed
    row = speed(GPUS, "all-to-all", 49)
    assert row.limit == "25 GB/s, half of cluster.network_gb_s"
    assert "cluster.network_gb_s=24.5" in row.fix and "cluster.interface=NAME" in row.fix
    assert (speed(CPU, "all-to-all", 0.001).outcome is Outcome.shown) and "gloo" in speed(CPU, "all-to-all", 1).figure
    one = compose_recipe(["engine=slime", "gpu=h100", "cluster.network_gb_s=50"])
    assert speed(one, "all-reduce", 0.001).outcome is Outcome.shown, "no network is in it"


def test_a_ray_that_cannot_be_reached_is_a_red_row(monkeypatch):
    @contextlib.contextmanager
    def gone(**_):
        raise ConnectionError("no Ray here")
        yield

    monkeypatch.setattr(cluster_checks, "connected", gone)
    recipe = compose_recipe(["engine=slime", f"engine.python={sys.executable}"])
    python, row = cluster_checks.connected_rows(recipe, Console(quiet=True))
    assert not python.failed
    assert row.failed and row.figure == "ConnectionError: no Ray here"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        (None, "No such file or directory"),
        ("echo Ray 1.0.0 for Python 3.8", "Ray 1.0.0 for Python 3.8"),
        ("echo ModuleNotFoundError: No module named 'ray' >&2; exit 1", "ModuleNotFoundError: No module named ray"),
        ("exit 1", "no output"),
    ],
)
def test_a_python_without_this_ray_is_named_before_a_ray_starts(tmp_path, monkeypatch, says, found):
    monkeypatch.setattr(cluster_checks, "connected", None)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    python = tmp_path / "python"
    if says is not None:
        python.write_text(f"#!/bin/sh\n{says}\n")
        python.chmod(0o755)
    (row,) = cluster_checks.connected_rows(
        compose_recipe(["engine=slime", f"engine.python={python}"]), Console(quiet=True)
    )
    assert row.failed and row.figure == f"engine.python={python}: {found}"
    assert row.fix.endswith("or engine.python=PYTHON of an environment that has it")


@pytest.mark.run
def test_a_run_on_cores_places_its_ranks_whatever_the_machine_has(monkeypatch):
    """As many of them as the driver's own Ray, which is started with the same."""
    POOL.close()  # this process has one Ray at a time
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    ranks = 2 * (os.cpu_count() or 1)
    recipe = compose_recipe(["engine=slime", f"engine.python={sys.executable}", f"cluster.gpus_per_node={ranks}"])
    rows = []

    def looked(r, seconds):
        known = cluster_checks.Known()
        rows.extend(
            [
                cluster_checks.nodes(r, known),
                cluster_checks.free_gpus(r, known.taken),
                cluster_checks.cpus(r, known.taken),
            ]
        )
        return []

    monkeypatch.setattr(cluster_checks, "cluster_rows", looked)
    python, row = cluster_checks.connected_rows(recipe, Console(quiet=True))
    assert not (python.failed or row.failed) and [r.failed for r in rows] == [False] * 3
    assert rows[2].figure == f"{ranks + 4}, {ranks + 4} in all"
    assert job.own_resources(recipe) == {"num_cpus": ranks + 4, "num_gpus": ranks}
    on_gpus = compose_recipe(["engine=slime", "gpu=h100", f"cluster.gpus_per_node={ranks}"])
    assert job.own_resources(on_gpus) == {"num_cpus": ranks + 4}, "Ray counts the GPUs itself"


def test_a_mend_names_only_what_is_there(monkeypatch):
    """Without a cluster there is none to add nodes to."""
    alone = {"Alive": True, "NodeManagerAddress": "n", "Resources": {"GPU": 4}}
    monkeypatch.setattr(cluster_checks.ray, "nodes", lambda: [alone])
    one = compose_recipe(["engine=slime", "gpu=h100", "cluster.gpus_per_node=8"])
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert cluster_checks.nodes(one, cluster_checks.Known()).fix == (
        "write cluster.nodes=1 cluster.gpus_per_node=4, or write cluster.address=http://HEAD:8265 of a larger cluster"
    )
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cluster_checks.nodes(one, cluster_checks.Known()).fix.endswith(
        "or add nodes to the cluster: ray start --address=HEAD:6379, on each"
    )


def on_nodes(asked, python=sys.executable, **env):
    """`nodes.py` on what it is asked."""
    nodes = [{"num_cpus": 3, "num_gpus": 2}, {"num_cpus": 2, "num_gpus": 2}]
    with tempfile.TemporaryFile("w+") as said:
        json.dump({"nodes": nodes, **asked}, said)
        said.seek(0)
        done = while_it_moves(
            [python, "tests/launch/slime/nodes.py"], stdin=said, env={**os.environ, "PYTHONPATH": str(REPO), **env}
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def red(case):
    """The red rows. The checkouts of these tests are empty repositories, so that the contract and the flags always are."""
    return [name for name, row in case["rows"].items() if row["red"] and name not in ("contract", "slime's flags")]


@pytest.fixture(scope="module")
def on_ray(root, checkouts, tmp_path_factory):
    """By name, what the preflight found on two real nodes: all good, and with one thing after the other spoiled."""
    folder = tmp_path_factory.mktemp("on-ray")
    (folder / "good" / "numpy-1.26.4.dist-info").mkdir(parents=True)
    (folder / "good" / "numpy-1.26.4.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 1.26.4\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "hydra.py").write_text("raise OSError")
    (folder / "file").touch()
    (folder / "apart").mkdir()
    (slime, _), (megatron, megatron_commit) = checkouts["slime"], checkouts["megatron"]
    good = [
        "engine=slime", "cluster.nodes=2", "cluster.gpus_per_node=2", f"cluster.root={root}", f"engine.slime_root={slime}",
        f"engine.python={sys.executable}",
        f"engine.megatron_root={megatron}", f"cluster.env.PYTHONPATH={folder}/good:{REPO}",
    ]  # fmt: skip
    recipe_of(root, *good)
    pins = {"MEGATRON": megatron_commit}
    cases = {
        "good": {"words": good},
        "late": {"words": good, "times": [0.1, 0.0]},
        "spoiled": {
            "words": [
                *good, "cluster.gpus_per_node=4", f"engine.slime_root={folder}/none", "engine.wandb=limi",
                f"cluster.root={folder}/file/root", f"cluster.env.PYTHONPATH={folder}/broken:{REPO}",
            ],
        },
        "no network": {"words": [*good, "cluster.interface=none0"], "times": [2.0, 30.0]},
    }  # fmt: skip
    apart = {"folder": f"{folder}/apart", "words": [*good, f"cluster.root={folder}/apart/root"], "times": [0.1, 0.0]}
    can_mount = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    for case in cases.values():
        case["pins"] = pins
    found = on_nodes({"cases": [*cases.values()]} | ({"apart": {**apart, "pins": pins}} if can_mount else {}))
    return dict(zip([*cases, "apart"], found, strict=False))


@pytest.mark.slow
def test_two_good_nodes_are_green(on_ray):
    case = on_ray["good"]
    assert red(case) == []
    assert [name for name, row in case["rows"].items() if row["outcome"] == "shown"] == [
        "Transformer Engine", "shared memory", "locked memory", "Weights & Biases", "all-reduce", "all-to-all",
    ]  # fmt: skip
    assert case["rows"]["cluster.root"]["figure"].endswith("2 of 2 nodes")
    assert "on the bus of 4 ranks, over gloo; not judged on a CPU" in case["rows"]["all-to-all"]["figure"]


@pytest.mark.slow
def test_everything_that_is_wrong_is_red_at_once_with_its_mend(on_ray):
    rows = on_ray["spoiled"]["rows"]
    fixes = {
        "nodes": "write cluster.nodes=2 cluster.gpus_per_node=2",
        "numpy": "SLIME_ROOT=FOLDER",
        "slime": "write engine.slime_root=FOLDER",
        "packages": "pip install hydra-core",
        "Weights & Biases": "engine.wandb=null",
        "cluster.root": "write cluster.root=FOLDER",
    }
    assert red(on_ray["spoiled"]) == list(fixes)
    assert rows["nodes"]["figure"] == "2 alive, GPUs: 2, 2"
    assert "NotADirectoryError" in rows["cluster.root"]["figure"]
    assert "hydra (OSError)" in rows["packages"]["figure"]
    assert rows["all-reduce"]["figure"] == "not known until what failed passes"


@pytest.mark.slow
def test_ranks_that_do_not_answer_end_in_a_red_row_in_time(on_ray):
    assert red(on_ray["late"]) == red(on_ray["no network"]) == ["all-reduce", "all-to-all"]
    assert "did not answer in time" in on_ray["late"]["rows"]["all-reduce"]["figure"]
    assert "none0" in on_ray["no network"]["rows"]["all-reduce"]["figure"]
    assert "cluster.interface=NAME" in on_ray["no network"]["rows"]["all-reduce"]["fix"]
    assert on_ray["late"]["seconds"] < 60


@pytest.mark.slow
def test_a_root_that_nodes_do_not_share_is_refused(on_ray):
    if "apart" not in on_ray:
        pytest.skip("cannot give a node a file system of its own here")
    row = on_ray["apart"]["rows"]["cluster.root"]
    assert row["red"] and row["figure"].count("does not see what") == 2


@pytest.mark.slow
def test_nothing_is_left_running(on_ray):
    assert [case["left"] for case in on_ray.values()] == [[]] * len(on_ray)


@pytest.mark.contract
@pytest.mark.slow
def test_slimes_own_environment_is_green(root):
    """The real checkouts and numpy, under the Python that runs slime."""
    python, env = pinned()
    words = ["engine=slime", "cluster.nodes=2", f"cluster.root={root}"]
    recipe_of(root, *words)
    (case,) = on_nodes({"cases": [{"words": words}]}, python, **{n: env[n] for n in ("SLIME_ROOT", "MEGATRON_ROOT")})
    assert red(case) == []
    assert case["rows"]["Megatron-LM"]["figure"] == f"{MEGATRON[:7]}, patched"
