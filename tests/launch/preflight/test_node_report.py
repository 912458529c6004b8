"""What a node says of itself: its checkouts, its packages, and the files that others wrote."""

from pathlib import Path

import pytest

from launch.cluster.image.pins import MEGATRON, PINNED
from launch.preflight import node_report
from launch.slime.contract import EVERYWHERE
from tests.launch.preflight.conftest import git
from tests.launch.slime.support import pinned


def test_checkouts_are_known_by_commit_and_patch(checkouts, tmp_path):
    (slime, commit), (megatron, _) = checkouts["slime"], checkouts["megatron"]
    assert node_report._commit(slime) == commit
    assert node_report._commit(f"{tmp_path}/none") == f"no folder {tmp_path}/none"
    assert node_report._commit(str(tmp_path)) == f"no git checkout in {tmp_path}"
    assert node_report._not_applied(Path(slime), megatron) == []
    git(tmp_path, "clone", "--quiet", megatron, "bare")
    assert node_report._not_applied(Path(slime), f"{tmp_path}/bare") == ["megatron.patch"]
    assert node_report._not_applied(tmp_path, megatron) is None


@pytest.mark.contract
def test_the_pinned_checkouts_are_what_is_asked_for():
    _, env = pinned()
    assert node_report._commit(env["SLIME_ROOT"]) == PINNED.commits[0]
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
