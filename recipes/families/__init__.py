"""Families of models. Each file holds all that is specific to one family and ends with its `FACTS`."""

import importlib
from functools import cache
from pathlib import Path

from recipes.config import Family
from recipes.families.common.facts import Facts


@cache
def facts(family: Family) -> Facts:
    """Return the facts of a family: everything that is specific to it."""
    found: Facts = importlib.import_module(f"recipes.families.{family.value}").FACTS
    return found


def template(family: Family) -> Path:
    """Return the chat template of the family's tiny model. It has the release's structure and the project's own text."""
    return Path(__file__).with_name(f"{family.value}.jinja")
