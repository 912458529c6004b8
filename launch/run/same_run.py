"""Check early that a recipe matches the run in its folder, in every setting that a run must not change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.pack import dataset
from data_prep.source_files import data_set, is_hub_id
from launch.run.fetch_models import repository
from launch.run.run_folder import another_recipe, fixed
from recipes.compose.recipe import from_yaml
from recipes.config import Recipe
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
    """Return whether the run's path `there` is the fetched file of the hub data set `here`."""
    named = here is not None and there is not None and is_hub_id(here)
    return named and Path(str(there)).parent == data_set(str(here), recipe.cluster.root).folder
