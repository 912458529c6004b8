"""Check early that a recipe matches the run in its folder, in every setting that a run must not change."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.pack import dataset
from data_prep.source_files import data_set, hub_part, is_hub_id
from launch.run import which_run
from launch.run.fetch_models import repository
from launch.run.run_folder import another_recipe, fixed
from recipes.compose.recipe import from_yaml
from recipes.config import EngineName, Recipe
from recipes.errors import ConfigError
from recipes.paths import run_folder


def refuse_another(recipe: Recipe) -> None:
    """Raise `ConfigError` if the run in the folder differs; the message lists names and values."""
    root = run_folder(recipe)
    run_recipe = from_yaml(root / "config.yaml")
    there, here = ({**fixed(r), **_options(r)} for r in (run_recipe, recipe))
    base = recipe.model.checkpoint
    if is_hub_id(base) and not Path(base).exists():  # fetched before, then removed
        here["model.checkpoint"] = str(repository(base, recipe.cluster.root).folder)
    different = [f"{name}={there[name]} there, {value} here" for name, value in here.items() if there[name] != value]
    if different := [*different, *_other_data(run_recipe, recipe, root)]:
        raise another_recipe(root, different)


def with_layout_of_run(recipe: Recipe) -> Recipe:
    """Return the recipe in the layout that its run began with, if it goes on from a checkpoint of slime.

    Such a checkpoint loads with another data parallelism only. Raise `ConfigError` if the recipe gives another degree, or if its GPUs
    do not divide into the run's layout.
    """
    root = run_folder(recipe)
    if recipe.anew or recipe.engine.name is not EngineName.slime or not which_run.whole(root):
        return recipe
    began, asked = from_yaml(root / "config.yaml").layout, recipe.layout
    given = asked.fixed if asked.search else _DEGREES
    if other := [name for name in _DEGREES if name in given and getattr(asked, name) != getattr(began, name)]:
        listed = ", ".join(f"layout.{name}={getattr(began, name)} there, {getattr(asked, name)} here" for name in other)
        raise ConfigError(
            f"run={recipe.run} goes on in the layout that it began with ({listed})",
            f"leave out {', '.join(f'layout.{name}' for name in other)} and write layout=auto; or write run=OTHER",
        )
    block = began.tp * began.pp * began.cp
    if (gpus := recipe.cluster.nodes * recipe.cluster.gpus_per_node) % block:
        raise ConfigError(
            f"run={recipe.run} goes on in tp {began.tp} x pp {began.pp} x cp {began.cp}, {block} GPUs each, and {gpus} GPUs are no "
            "multiple of it",
            f"write cluster.nodes={_nodes(recipe, block)}, or another multiple",
        )
    return replace(recipe, layout=replace(began, search=False, dp=asked.dp)) if asked.search else recipe


_DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp", "first_stage_layers", "last_stage_layers")


def _nodes(recipe: Recipe, block: int) -> int:
    """Return the nearest smaller number of nodes, or the smallest, whose GPUs are a multiple of `block`."""
    able = [n for n in range(1, max(recipe.cluster.nodes, block) + 1) if n * recipe.cluster.gpus_per_node % block == 0]
    return max((n for n in able if n <= recipe.cluster.nodes), default=min(able))


def _options(r: Recipe) -> dict[str, Any]:
    return {f"data.{name}": value for name, value in dataset.options(r).items()}


def _other_data(run_recipe: Recipe, recipe: Recipe, root: Path) -> Iterator[str]:
    """Yield the differences in data and tokenizer.

    Compare trajectories by hash, because the same file may have moved. Compare paths if a file or its packed data is gone.
    """
    plan = json.loads((root / "plan.json").read_text(encoding="utf-8"))
    packed = {name: _inputs(plan[key]) for name, key in (("data.path", "data"), ("data.heldout", "heldout"))}
    for name, inputs in packed.items():
        there, here = (getattr(r.data, name.removeprefix("data.")) for r in (run_recipe, recipe))
        if here is not None and inputs is not None and Path(here).exists():
            if dataset.source_hashes(Path(here)) != inputs["source"]:
                yield f"{name}={there} there, {here} here, and its content differs from the trajectories trained on"
        elif there != here and not _fetched_from(here, there, recipe):
            yield f"{name}={there} there, {here} here"
    checkpoint, inputs = Path(recipe.model.checkpoint), packed["data.path"]
    if inputs is not None and (checkpoint / "tokenizer.json").is_file():
        now = dataset.tokenizer_hashes(checkpoint)
        if other := sorted(n for n in now.keys() | inputs["tokenizer"] if now.get(n) != inputs["tokenizer"].get(n)):
            yield f"{', '.join(other)} of model.checkpoint={checkpoint} differ from the files that the data was packed with"


def _inputs(planned: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the inputs of a packed data set, or None if it is gone or the run had none."""
    path = planned and Path(planned["folder"]) / "manifest.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["inputs"]) if path and path.is_file() else None


def _fetched_from(here: str | None, there: str | None, recipe: Recipe) -> bool:
    """Return whether the run's path `there` is the hub data set `here` as fetched: its folder, or a file in it."""
    if here is None or there is None or not is_hub_id(here):
        return False
    parts = [hub_part(recipe.data, option) for option in ("data.path", "data.heldout")]
    folders = [data_set(here, recipe.cluster.root, part).folder for part in parts]
    return any(Path(there).is_relative_to(folder) for folder in folders)
