"""The page of a data set: every record in the table, and every text of the data escaped."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.pack.dataset import prepare
from data_prep.pack.set_page import grouped, write_set_page
from data_prep.text.tokenizer import load_tokenizer
from recipes.errors import ConfigError
from tests.data_prep.pack.test_dataset import fresh, record  # noqa: F401  # a fixture
from tests.data_prep.support import assistant, user


def test_every_record_is_in_the_table_and_each_kept_one_can_be_read(fresh, tmp_path):  # noqa: F811
    recipe, source = fresh
    recipe.cluster.root, recipe.data.max_rejected = str(tmp_path), 1
    evil = "</script><script>alert(1)</script>\x1b[2J"
    kept = record(user(evil), assistant("<b>done</b>"), id="<i>one</i>")
    data = prepare(recipe, source(kept, record(user(), id="two")))
    read = []
    page = write_set_page(
        data, "training", load_tokenizer(Path(recipe.model.checkpoint)), recipe, lambda: read.append(1)
    )
    text = page.read_text()
    (raw,) = re.findall(r'<script type="application/json" id=rows>(.*?)</script>', text, re.S)
    rows = json.loads(raw)
    assert [r["cells"][:2] for r in rows] == [["<i>one</i>", "kept"], ["two", "rejected: no_supervised"]]
    assert [r["page"] for r in rows] == ["read/1.html", None] and len(read) == 1
    reader = (page.parent / "read" / "1.html").read_text()
    for whole in (text, reader):
        assert "alert(1)</script>" not in whole and "<i>one" not in whole and "\x1b" not in whole
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in reader and "<mark>&lt;b&gt;done" in reader


def test_repairs_of_several_messages_are_one():
    repairs = [f"message {n}: null content read as empty" for n in (2, 4, 6, 8)] + ["kept as metadata: a"]
    assert grouped(repairs) == ["messages 2, 4, 6 and 1 more: null content read as empty", "kept as metadata: a"]
    assert grouped(["message 2: x"]) == ["message 2: x"]


def test_the_command_writes_a_page_of_each_set(fresh):  # noqa: F811
    from dataclasses import replace

    from launch.cli.before_training import inspect

    recipe, source = fresh
    said = Console(record=True, width=200)
    path = source(record(user(), assistant("done")))
    inspect(replace(recipe, html=True, data=replace(recipe.data, path=path, heldout=None)), said)
    assert re.search(r"training: .*/inspect/[0-9a-f]{16}/index\.html", said.export_text())
    with pytest.raises(ConfigError, match="html=true writes a page of the whole set, and id=one names one trajectory"):
        inspect(replace(recipe, html=True, id="one"), said)
