"""Imports all of recipes/, composes and plans a run, and fails where that imported torch or ray: `python -m tests.recipes.imports`, a
process of its own."""

import importlib
import pkgutil
import sys

import recipes
from recipes.compose.recipe import compose_recipe
from recipes.plan import planner
from recipes.plan.search import Sequences
from recipes.plan.shown import plan_summary
from recipes.schedule import lengths


def main() -> None:
    for module in pkgutil.walk_packages(recipes.__path__, "recipes."):
        importlib.import_module(module.name)
    made = planner.make_plan(compose_recipe(["model=qwen3-4b"]), Sequences(range(78), lengths.quantiles(), ""))
    plan_summary.summary(made, "")
    assert not [name for name in ("torch", "ray") if name in sys.modules]


if __name__ == "__main__":
    main()
