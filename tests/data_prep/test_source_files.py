"""A data set on the hub, played by a server on loopback."""

import pytest

from data_prep import source_files
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


def test_two_json_files_are_not_guessed_between(hub, tmp_path):
    hub.repos["datasets/GAIR/LIMI"].files["other.jsonl"] = b""
    with pytest.raises(DataError, match=r"2 JSON files \(limi\.json, other\.jsonl\)"):
        source_files.local("GAIR/LIMI", str(tmp_path))
    assert not list(tmp_path.iterdir())


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
