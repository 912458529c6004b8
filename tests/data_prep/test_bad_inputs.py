"""Every file of `bad/` is refused with the code and the words that `expected.json` gives it."""

import json
from pathlib import Path

import pytest

from data_prep.pack.packer import Packer
from data_prep.sources import source
from recipes.compose.recipe import compose_recipe

FOLDER = Path(__file__).parent / "bad"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_every_file_has_an_expectation():
    assert sorted(p.name for p in FOLDER.iterdir() if p.name != "expected.json") == sorted(EXPECTED)
    assert len(EXPECTED) >= 60


@pytest.fixture(scope="module")
def packers(bases):
    def packer(name):
        recipe = compose_recipe(
            [f"data={name}", "data.path=x", "data.max_tokens=4000", f"model.checkpoint={bases['qwen3-tiny']}"]
        )
        return Packer(recipe)

    return {name: packer(name) for name in ("limi", "openai", "requests")}


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_refused_by_name(packers, name):
    from data_prep.pack.pack import Seen

    kind = name.split("-")[0]
    seen, ledger = Seen(), {}
    for record in source(kind).records(FOLDER / name):
        ledger = seen.identify(packers[kind].pack(record))
    assert ledger["status"] == "rejected"
    assert ledger["code"] == EXPECTED[name]["code"], ledger["reason"]
    assert EXPECTED[name]["says"] in ledger["reason"]
