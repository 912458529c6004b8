"""The checkpoint of a tiny model: made anew when anything that it is made of changes."""

import json

import pytest

from data_prep.files import sha256
from launch.weights.tiny import RECORD
from recipes.config import Family
from recipes.families import facts, template


@pytest.mark.parametrize("family", Family, ids=lambda family: family.value)
def test_its_record_covers_the_family_s_file_and_template(bases, family):
    made_of = json.loads((bases[facts(family).tiny.model] / RECORD).read_text(encoding="utf-8"))["sources"]
    for path in (template(family), template(family).with_suffix(".py")):
        assert made_of[path.name] == sha256(path)
