"""What nodes report, judged: the row that is red, what it says, and what mends it."""

import pytest

from launch.checks import Outcome
from launch.cluster.image.pins import MEGATRON, NEWEST_IMAGE, PINNED, TRANSFORMER_ENGINE, V0_3_1, VERSIONS
from launch.preflight import node_checks
from recipes.compose.recipe import compose_recipe

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


def test_patches_are_not_asked_of_a_slime_that_is_red():
    rows = judged(GPUS, slime="no folder /x", patches=None)
    assert [name for name, row in rows.items() if row.failed] == ["slime"]
    assert rows["Megatron-LM"].outcome is Outcome.shown


def test_files_that_are_not_here_either_are_the_rows_of_model_and_data():
    row = node_checks.files(GPUS, {"a": GOOD | {"unseen": ["/x"]}}, None)
    assert not row.failed and (row.outcome is Outcome.shown)


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
