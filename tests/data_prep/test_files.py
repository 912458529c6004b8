import pytest

from data_prep.files import sha256, whole_folder, write_text


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "set"
    with whole_folder(target) as scratch:
        (scratch / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "other") as scratch:
        (scratch / "a").write_text("1")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_the_first_of_two_makers_wins(tmp_path):
    target = tmp_path / "set"
    with whole_folder(target) as late:
        (late / "a").write_text("late")
        with whole_folder(target) as early:
            (early / "a").write_text("early")
    assert (target / "a").read_text() == "early"


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "x" / "file"
    write_text(path, "old")
    write_text(path, "new ü")
    assert path.read_text() == "new ü"
    assert list(path.parent.iterdir()) == [path]
    assert len(sha256(path)) == 64
