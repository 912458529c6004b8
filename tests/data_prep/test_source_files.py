"""A data set on the hub, played by a server on loopback."""

import json

import pytest

from data_prep import source_files
from data_prep.records import files_of
from data_prep.source_files import HubPart
from recipes.errors import DataError
from tests.hub import Hub, Repo


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.repos["datasets/GAIR/LIMI"] = Repo({"limi.json": b"[]", "README.md": b"x"})
    hub.here(monkeypatch)
    yield hub
    hub.close()


def test_a_local_path_is_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    assert source_files.local(str(path), str(tmp_path)) == path


@pytest.mark.parametrize("path", ["none.jsonl", "/no/such/file", "a/b/c", "../x/y", ""])
def test_what_is_neither_a_file_nor_an_id_is_refused(path, tmp_path):
    with pytest.raises(DataError, match=r"data\.path=FILE"):
        source_files.local(path, str(tmp_path))


def test_the_one_json_file_of_a_hub_data_set_is_fetched_once(hub, tmp_path):
    path = source_files.local("GAIR/LIMI", str(tmp_path))
    assert path == tmp_path / "data-sources" / "GAIR--LIMI" / "limi.json"
    assert path.read_bytes() == b"[]"
    hub.asked.clear()
    assert source_files.local("GAIR/LIMI", str(tmp_path)) == path
    assert not hub.asked


def test_a_file_that_was_cut_since_is_fetched_again(hub, tmp_path):
    path = source_files.local("GAIR/LIMI", str(tmp_path))
    path.write_bytes(b"[")
    assert source_files.local("GAIR/LIMI", str(tmp_path)).read_bytes() == b"[]"


def test_two_files_are_not_guessed_between(hub, tmp_path):
    hub.repos["datasets/GAIR/LIMI"].files["other.jsonl"] = b""
    with pytest.raises(
        DataError,
        match=r"data files limi\.json, other\.jsonl.*2 of them, where one was expected; write data\.split=NAME, one of limi",
    ):
        source_files.local("GAIR/LIMI", str(tmp_path))
    assert not list(tmp_path.iterdir())


SHARDS = {
    "data/train-00000-of-00002.parquet": b"a", "data/train-00001-of-00002.parquet": b"b",
    "data/test-00000-of-00001.parquet": b"c", "dataset_infos.json": b"{}",
}  # fmt: skip


def test_the_shards_of_a_split_are_fetched_and_no_other_file(hub, tmp_path):
    hub.repos["datasets/ORG/SHARDS"] = Repo(dict(SHARDS))
    path = source_files.local("ORG/SHARDS", str(tmp_path), part=HubPart(split="train"))
    assert path == tmp_path / "data-sources" / "ORG--SHARDS--train"
    assert [f.read_bytes() for f in files_of(path)] == [b"a", b"b"]
    assert source_files.local("ORG/SHARDS", str(tmp_path), part=HubPart(split="test")).read_bytes() == b"c"
    with pytest.raises(DataError, match=r"its splits are train, test: 0 fit data\.split=tran"):
        source_files.local("ORG/SHARDS", str(tmp_path), part=HubPart(split="tran"))
    del hub.repos["datasets/ORG/SHARDS"].files["data/test-00000-of-00001.parquet"]
    assert len(files_of(source_files.local("ORG/SHARDS", str(tmp_path)))) == 2, "the only split needs no name"


def test_a_split_of_several_configurations_is_not_guessed(hub, tmp_path):
    hub.repos["datasets/ORG/TWO"] = Repo(
        {"a/train-00000-of-00001.parquet": b"a", "b/train-00000-of-00001.parquet": b"b"}
    )
    with pytest.raises(DataError, match=r"its splits are a/train, b/train: 2 fit data\.split=train"):
        source_files.local("ORG/TWO", str(tmp_path), part=HubPart(split="train"))
    assert source_files.local("ORG/TWO", str(tmp_path), part=HubPart(split="a")).read_bytes() == b"a"
    assert source_files.local("ORG/TWO", str(tmp_path), part=HubPart(split="b/train")).read_bytes() == b"b"
    with pytest.raises(DataError, match="2 of them, where one was expected"):
        source_files.local("ORG/TWO", str(tmp_path))


def test_a_revision_is_asked_for_and_has_a_folder_of_its_own(hub, tmp_path):
    old, new = "a" * 40, "b" * 40
    hub.repos["datasets/GAIR/LIMI"].commits = [old, new]
    path = source_files.local("GAIR/LIMI", str(tmp_path), part=HubPart(revision=old))
    assert path == tmp_path / "data-sources" / f"GAIR--LIMI--{old}" / "limi.json"
    assert json.loads(path.parent.with_name(f"{path.parent.name}.json").read_text())["commit"] == old
    source_files.local("GAIR/LIMI", str(tmp_path))
    assert json.loads((tmp_path / "data-sources" / "GAIR--LIMI.json").read_text())["commit"] == new
    with pytest.raises(DataError, match="this revision of the dataset GAIR/LIMI"):
        source_files.local("GAIR/LIMI", str(tmp_path), part=HubPart(revision="c" * 40))


def test_an_unknown_data_set_is_refused(hub, tmp_path):
    with pytest.raises(DataError, match=r"'GAIR/NONE' is not a local file, and the hub has no dataset GAIR/NONE"):
        source_files.local("GAIR/NONE", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_damaged_answer_is_refused(hub, tmp_path):
    hub.repos["datasets/GAIR/LIMI"].spoiled.add("limi.json")
    with pytest.raises(DataError, match=r"limi\.json of GAIR/LIMI is not the file that the hub lists"):
        source_files.local("GAIR/LIMI", str(tmp_path))


def test_a_file_in_a_folder_of_the_data_set_is_fetched_and_none_outside_it(hub, tmp_path):
    hub.repos["datasets/GAIR/LIMI"].files = {
        "data/train.jsonl": b"{}",
        "../../out.jsonl": b"",
        "/out.jsonl": b"",
        ".hidden/out.jsonl": b"",
    }
    path = source_files.local("GAIR/LIMI", str(tmp_path))
    assert path == tmp_path / "data-sources" / "GAIR--LIMI" / "data" / "train.jsonl"
    assert path.read_bytes() == b"{}"
