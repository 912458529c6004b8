"""Families of models: all that differs between them, one file each, which ends with its `FACTS`."""

import importlib
from functools import cache
from pathlib import Path

from recipes.config import Family
from recipes.families.common.facts import Facts


@cache
def facts(family: Family) -> Facts:
    """Return what a family says of itself."""
    found: Facts = importlib.import_module(f"recipes.families.{family.value}").FACTS
    return found


def template(family: Family) -> Path:
    """Return the chat template of the family's tiny model: with the structure of the release's, and text of this project."""
    return Path(__file__).with_name(f"{family.value}.jinja")
