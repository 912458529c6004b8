"""The checks of the cluster: what they make of a node's report, and on real Ray nodes of this machine."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from launch.checks import Outcome
from launch.cluster.image.pins import MEGATRON, NEWEST_IMAGE, PINNED, TRANSFORMER_ENGINE, V0_3_1, VERSIONS
from launch.preflight import cluster_checks, node_checks, node_report
from launch.slime import job
from launch.slime.contract import EVERYWHERE
from recipes.compose.recipe import compose_recipe
from tests.conftest import REPO
from tests.launch.slime.support import pinned
from tests.launch.support import POOL, recipe_of, while_it_moves

SLIME = PINNED.commits[0]
CPU = compose_recipe(["engine=slime", "cluster.nodes=2"])
GPUS = compose_recipe(
    ["engine=slime", "gpu=h100", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.network_gb_s=50"]
)
GOOD = {
    "python": "3.12.3", "slime": SLIME, "megatron": MEGATRON, "patches": [], "broken": [], "missing": [], "unseen": [],
    "versions": {"numpy": "1.26.4", "torch": "2.9.1", "ray": "2.60.0", "transformer_engine": TRANSFORMER_ENGINE},
    "shm": 10**12, "memlock": None, "infiniband": True, "wandb": True,
}  # fmt: skip
JUDGES = {
    "numpy": node_checks.numpy,
    "software": lambda r, said: node_checks.software(said),
    "Transformer Engine": node_checks.transformer_engine,
    "slime": node_checks.slime,
    "Megatron-LM": node_checks.megatron,
    "contract": lambda r, said: node_checks.contract(said),
    "packages": lambda r, said: node_checks.packages(said),
    "files": lambda r, said: node_checks.files(r, said, ["/x/config.json"]),
    "shared memory": node_checks.shared_memory,
    "locked memory": node_checks.locked_memory,
}
# What one of two nodes says otherwise, the row it makes red, and what that says.
FAULTS = [
    ({"versions": GOOD["versions"] | {"numpy": "2.4.6"}}, "numpy", "2.4.6 on b", "pip install numpy==1.26.4"),
    ({"python": "3.11.1"}, "software", "python 3.11.1, torch 2.9.1, ray 2.60.0 on b", "slimerl/slime"),
    ({"versions": GOOD["versions"] | {"transformer_engine": None}}, "Transformer Engine", "None on b", "slimerl/slime"),
    ({"slime": "no folder /x"}, "slime", "no folder /x on b", "write engine.slime_root=FOLDER"),
    ({"slime": "0" * 40}, "slime", f"{'0' * 40} on b", f"git -C /root/slime checkout {SLIME}"),
    ({"megatron": "0" * 40}, "Megatron-LM", "on b", f"git -C /root/Megatron-LM checkout {MEGATRON}"),
    ({"patches": ["megatron.patch"]}, "Megatron-LM", "without megatron.patch", "git -C /root/Megatron-LM apply"),
    ({"patches": None}, "Megatron-LM", "were not found", "git -C /root/slime checkout -- docker/patch"),
    ({"broken": ["a.py: has no b"]}, "contract", "a.py: has no b on b", f"check out slime {SLIME[:7]}"),
    ({"missing": ["hydra (ModuleNotFoundError)"]}, "packages", "hydra", "pip install hydra-core numpy==1.26.4"),
    ({"unseen": ["/x/config.json"]}, "files", "/x/config.json", "model.checkpoint=FOLDER"),
    ({"shm": 64 << 20}, "shared memory", "0.1 GB", "--shm-size=8g"),
    ({"memlock": 8 << 20}, "locked memory", "8.39 MB on b", "--ulimit memlock=-1"),
]  # fmt: skip


def judged(r, **other):
    """Rows of two nodes, one of which reports this otherwise."""
    said = {"a": GOOD, "b": GOOD | other}
    return {name: judge(r, said) for name, judge in JUDGES.items()}


@pytest.mark.parametrize(("other", "name", "found", "fix"), FAULTS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_node_that_is_not_as_the_others_is_refused(monkeypatch, other, name, found, fix):
    monkeypatch.setattr(GPUS.engine, "slime_root", "/root/slime")
    monkeypatch.setattr(GPUS.engine, "megatron_root", "/root/Megatron-LM")
    assert [n for n, row in judged(GPUS).items() if row.failed or (row.outcome is Outcome.shown)] == []
    rows = judged(GPUS, **other)
    assert [n for n, row in rows.items() if row.failed] == [name]
    assert found in rows[name].figure and fix in rows[name].fix


def test_on_a_cpu_what_makes_no_sense_there_says_so():
    rows = judged(CPU, versions=GOOD["versions"] | {"transformer_engine": None}, memlock=1, shm=1)
    shown = [name for name, row in rows.items() if (row.outcome is Outcome.shown)]
    assert shown == ["Transformer Engine", "shared memory", "locked memory"]
    assert all("not on a CPU" in rows[name].figure for name in shown)
    assert not any(row.failed for row in rows.values())


def test_the_key_of_weights_and_biases_must_be_there_where_it_is_used():
    r = compose_recipe(["engine=slime", "engine.wandb=limi"])
    assert not node_checks.wandb(r, {"a": GOOD}).failed
    row = node_checks.wandb(r, {"a": GOOD, "b": GOOD | {"wandb": False}})
    assert row.figure == "no WANDB_API_KEY on b" and "engine.wandb=null" in row.fix
    assert node_checks.wandb(CPU, {"a": GOOD | {"wandb": False}}).outcome is Outcome.shown


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


def test_patches_are_not_asked_of_a_slime_that_is_red():
    rows = judged(GPUS, slime="no folder /x", patches=None)
    assert [name for name, row in rows.items() if row.failed] == ["slime"]
    assert rows["Megatron-LM"].outcome is Outcome.shown


def test_files_that_are_not_here_either_are_the_rows_of_model_and_data():
    row = node_checks.files(GPUS, {"a": GOOD | {"unseen": ["/x"]}}, None)
    assert not row.failed and (row.outcome is Outcome.shown)


def git(folder, *words):
    author = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    done = subprocess.run(["git", *words], cwd=folder, env={**os.environ, **author}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """A slime with a patch, and a Megatron-LM to which it is applied: their folders and commits."""
    root = tmp_path_factory.mktemp("checkouts")
    found = {}
    for name in ("slime", "megatron"):
        (root / name).mkdir()
        git(root / name, "init", "--quiet")
        (root / name / "code.py").write_text("before\n")
        git(root / name, "add", "-A")
        git(root / name, "commit", "--quiet", "--message", name)
        found[name] = str(root / name), git(root / name, "rev-parse", "HEAD").strip()
    (root / "megatron" / "code.py").write_text("after\n")
    patches = root / "slime" / "docker" / "patch" / "latest"
    patches.mkdir(parents=True)
    (patches / "megatron.patch").write_text(git(root / "megatron", "diff"))
    return found


def test_checkouts_are_known_by_commit_and_patch(checkouts, tmp_path):
    (slime, commit), (megatron, _) = checkouts["slime"], checkouts["megatron"]
    assert node_report._commit(slime) == commit
    assert node_report._commit(f"{tmp_path}/none") == f"no folder {tmp_path}/none"
    assert node_report._commit(str(tmp_path)) == f"no git checkout in {tmp_path}"
    assert node_report._not_applied(Path(slime), megatron) == []
    git(tmp_path, "clone", "--quiet", megatron, "bare")
    assert node_report._not_applied(Path(slime), f"{tmp_path}/bare") == ["megatron.patch"]
    assert node_report._not_applied(tmp_path, megatron) is None


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_every_slime_that_was_checked_is_taken_whichever_commit_its_image_holds(version):
    for commit in version.commits:
        row = node_checks.slime(GPUS, {"a": GOOD | {"slime": commit}, "b": GOOD | {"slime": commit}})
        assert row.outcome is Outcome.passed and version.name in row.figure


def test_another_slime_warns_and_one_that_breaks_the_contract_is_refused_with_those_that_work():
    said = {"a": GOOD | {"slime": "0" * 40, "broken": ["a.py: has no b"]}}
    row = node_checks.slime(GPUS, said)
    assert row.outcome is Outcome.warned and "'contract'" in row.fix
    refused = node_checks.contract(said)
    assert refused.failed
    for known in (NEWEST_IMAGE.image, V0_3_1.image, SLIME[:7], MEGATRON[:7]):
        assert known in refused.fix


@pytest.mark.contract
def test_the_pinned_checkouts_are_what_is_asked_for():
    _, env = pinned()
    assert node_report._commit(env["SLIME_ROOT"]) == SLIME
    assert node_report._commit(env["MEGATRON_ROOT"]) == MEGATRON
    assert node_report._not_applied(Path(env["SLIME_ROOT"]), env["MEGATRON_ROOT"]) == []


def test_a_report_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise OSError('libx.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    said = node_report.report(
        ["numpy", "nobody"], ["json", "broken", "nobody"], "/x", "/y", EVERYWHERE, [str(tmp_path), "/nowhere"]
    )
    assert said["versions"]["nobody"] is None and said["versions"]["numpy"]
    assert said["missing"] == ["broken (OSError)", "nobody (ModuleNotFoundError)"]
    assert said["unseen"] == ["/nowhere"]
    assert said["wandb"] is True and "secret" not in str(said)


def test_a_file_that_another_node_did_not_write_is_seen_to_be_missing(tmp_path):
    folder = str(tmp_path / "new" / "folder")
    node_report.write_nonce(folder, "a", "1")
    assert node_report.unread(folder, {"a": "1", "b": "2"}) == ["b"]
    assert node_report.unread(folder, {"a": "another"}) == ["a"]
    node_report.remove(folder)
    assert not Path(folder).exists()


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
