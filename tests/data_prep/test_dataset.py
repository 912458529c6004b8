import json

import pytest

from data_prep.dataset import open_dataset, prepare
from recipes.errors import DataError
from tests.launch.support import recipe_of


def test_the_data_set_holds_every_record_and_its_manifest_says_how(root):
    recipe, data, _ = recipe_of(root)
    counts = data.manifest["counts"]
    assert counts["records"] == counts["sequences"] == len(data.ids) == 20
    assert counts["tokens"] == sum(data.lengths) == sum(len(data.tokens(i)) for i in range(20))
    assert counts["supervised"] == sum(data.supervised)
    assert [sum(e - s for s, e in data.spans(i)) for i in range(20)] == data.supervised
    assert "every supervised turn" in data.manifest["proof"]
    ledger = [json.loads(line) for line in (data.folder / "ledger.jsonl").read_text().splitlines()]
    assert [line["id"] for line in ledger] == data.ids


def test_preparing_again_is_a_cache_hit_and_other_options_are_not(root):
    recipe, data, _ = recipe_of(root)
    before = (data.folder / "manifest.json").stat().st_mtime_ns
    from pathlib import Path

    assert prepare(recipe, Path(recipe.data.path)).folder == data.folder
    assert (data.folder / "manifest.json").stat().st_mtime_ns == before
    recipe.data.max_tokens -= 1
    assert prepare(recipe, Path(recipe.data.path)).folder != data.folder


def test_a_refused_data_set_leaves_nothing_behind(root, tmp_path):
    recipe, data, _ = recipe_of(root, f"data.out={tmp_path}/out")
    made = set((tmp_path / "out").iterdir())
    recipe.data.max_tokens = 100
    from pathlib import Path

    with pytest.raises(DataError, match=r"write data\.max_tokens="):
        prepare(recipe, Path(recipe.data.path))
    twice = tmp_path / "twice.jsonl"
    line = Path(recipe.data.path).read_text().splitlines()[0]
    twice.write_text(f"{line}\n{line}\n")
    recipe.data.max_tokens = 10_000
    with pytest.raises(DataError, match="more than once"):
        prepare(recipe, twice)
    assert set((tmp_path / "out").iterdir()) == made


def test_a_changed_file_is_found(root, tmp_path):
    recipe, data, _ = recipe_of(root, f"data.out={tmp_path}")
    with (data.folder / "sequences.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="not the file its manifest names"):
        open_dataset(data.folder)
