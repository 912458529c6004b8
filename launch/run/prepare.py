"""Prepare the inputs of a stage: the base model, the packed data, and the recipe with a chosen layout."""

from pathlib import Path

from rich.console import Console

from data_prep.pack.dataset import Dataset, overlap, prepare, repeated
from data_prep.source_files import hub_part, is_hub_id, local
from launch.run.fetch_models import local_checkpoint
from launch.run.run_plan import Plan
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.plan import planner
from recipes.plan.search import Sequences
from recipes.schedule import lengths


def base(recipe: Recipe, console: Console) -> None:
    """Create the checkpoint of a tiny model if it is missing. Raise `ConfigError` if a hub model is not fetched."""
    local_checkpoint(recipe)
    if recipe.model.random_init:
        from launch.weights import tiny

        if tiny.make(recipe):
            console.print(f"created {recipe.model.checkpoint} with random weights")


def packed(recipe: Recipe, console: Console) -> dict[str, Dataset]:
    """Return the packed data sets: `training`, and `held out` if the recipe names one. Print a warning for repeats."""
    base(recipe, console)
    if recipe.data.heldout is not None:
        # Fail now, not after hours of packing.
        part = hub_part(recipe.data, "data.heldout")
        local(recipe.data.heldout, recipe.cluster.root, "data.heldout", part)
    found = {"training": prepare(recipe, recipe.data.path)}
    if recipe.data.heldout is not None:
        found["held out"] = prepare(recipe, recipe.data.heldout, "data.heldout")
        _warn(
            console,
            "held-out trajectories are among the training ones",
            overlap(found["held out"], found["training"]),
        )
    for name, one in found.items():
        _warn(console, f"{name} trajectories have the same content as an earlier one", repeated(one))
    return found


def _warn(console: Console, what: str, pairs: list[tuple[str, str]]) -> None:
    if pairs:
        shown = ", ".join(f"{a} = {b}" for a, b in pairs[:5])
        console.print(f"{len(pairs)} {what}: {shown}{' …' if len(pairs) > 5 else ''}", style="yellow")


def prepare_plan(recipe: Recipe, console: Console) -> Plan:
    """Return the plan of the recipe. Pack the data unless it is cached, and search the layout if the recipe asks for it."""
    return settled(recipe, packed(recipe, console))


def settled(recipe: Recipe, data: dict[str, Dataset]) -> Plan:
    """Return the plan as `plan` does, from the result of `packed`."""
    if recipe.layout.search:
        recipe = planner.make_plan(recipe, _of_data(recipe, data["training"])).recipe
    return Plan(recipe, data["training"], data.get("held out"))


def _of_data(recipe: Recipe, data: Dataset) -> Sequences:
    return Sequences(data.trajectory, data.lengths, f"packed from {recipe.data.path}")


def sequences(recipe: Recipe, console: Console) -> Sequences:
    """Return the training sequences, from the packed data.

    If the data or the tokenizer is not on this machine, return LIMI's published lengths.
    """
    missing = []
    if not Path(recipe.data.path).exists():
        if not is_hub_id(recipe.data.path):
            local(recipe.data.path, recipe.cluster.root)  # raises with the reason
        missing.append(f"data.path={recipe.data.path}")
    if not recipe.model.random_init and not (Path(recipe.model.checkpoint) / "tokenizer.json").is_file():
        missing.append(f"model.checkpoint={recipe.model.checkpoint}")
    if missing:
        assumed = [n for n in lengths.quantiles() if n <= recipe.data.max_tokens]
        if not assumed:
            raise ConfigError(
                f"data.max_tokens={recipe.data.max_tokens} is below the shortest of LIMI's trajectories, {lengths.SHORTEST:,} "
                "tokens",
                "raise it, or name data and a tokenizer that are on this machine",
            )
        console.print(
            f"not on this machine: {' and '.join(missing)}. No data was measured: the plan assumes {len(assumed)} sequences "
            f"with LIMI's published lengths, {assumed[0]:,} to {assumed[-1]:,} tokens",
            style="yellow",
        )
        return Sequences(range(len(assumed)), assumed, "as LIMI's were published")
    return _of_data(recipe, packed(recipe, console)["training"])
