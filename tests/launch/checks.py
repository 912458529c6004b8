"""What tests of the checks before a run share."""

import re
from dataclasses import replace

from launch.preflight import recipe_checks
from tests.launch.support import recipe_of

GLM = ("model=glm4.5-tiny", "engine=slime", "cluster.gpus_per_node=2")


def checked(root, *words, **layout):
    """Rows by name. layout: values that composing a recipe would refuse already."""
    recipe, data, heldout = recipe_of(root, *words)
    recipe = replace(recipe, layout=replace(recipe.layout, **layout))
    return {row.name: row for row in recipe_checks.recipe_rows(recipe, lambda: {"training": data, "held out": heldout})}


def red(rows):
    return [name for name, row in rows.items() if row.failed]


def odd(rows):
    return [name for name, row in rows.items() if row.warned]


def overrides(fix):
    """What a fix says to write, before what else one could."""
    name = r"\b((?:model|optim|layout|engine|cluster|data)\.[\w.-]+)"
    found = dict(re.findall(name + r"=([^\s,;]+)", fix.split(", or ")[0]))
    return [f"{name}={value}" for name, value in found.items()]
