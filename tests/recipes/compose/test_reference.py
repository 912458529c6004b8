"""REFERENCE.md is what the schema says, and says something of every option."""

import re

from recipes.compose import reference
from recipes.compose.options import NAMES


def test_it_is_not_stale():
    assert reference.PATH.read_text(encoding="utf-8") == reference.reference(), "write it anew: make reference"


def test_every_option_has_a_line_and_a_meaning():
    rows = dict(re.findall(r"^\| `([^`]+)` \| .* \| (.*) \|$", reference.reference(), re.M))
    assert rows.keys() == NAMES.keys()
    assert [name for name, meaning in rows.items() if not meaning.strip()] == []


def test_only_an_option_without_a_default_is_required():
    rows = dict(re.findall(r"^\| `([^`]+)` \| [^|]* \| ([^|]*) \|", reference.reference(), re.M))
    assert rows["engine.args"] == rows["model.template_options"] == "`{}`" and rows["model.layers"] == "required"
