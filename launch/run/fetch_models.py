"""Fetch models of the Hugging Face hub once into `models/ORG--NAME` of `cluster.root`."""

import time
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep import hub
from data_prep.source_files import data_set, fetched_path, hub_part, is_hub_id, local
from recipes.checkpoint.checkpoint_config import read_config
from recipes.compose import commands
from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError

RECORD = "limi.json"  # next to the model's own files: their commit and hashes
# Weights, their index, configuration, chat template and tokenizer. No code and no pickles: pickles can run code.
KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")


def repository(name: str, root: str) -> hub.Repository:
    """Return a hub model with its folder and record under `cluster.root`."""
    folder = Path(root) / "models" / name.replace("/", "--")
    return hub.Repository(name, "model", folder, folder / RECORD)


def fetch(there: hub.Repository) -> None:
    """Fetch the model completely. Do not contact the hub if it is already complete.

    Raise `PreflightError` if the hub does not deliver it, if it needs code of its own, or for any reason of `hub.download`.
    """
    if there.files() is not None:
        return
    listing = hub.listing(there)
    files = [f for f in listing.files if is_wanted(f.name)]
    config = [f for f in files if f.name == "config.json"]
    if not config or not any(f.name.endswith(".safetensors") for f in files):
        raise PreflightError(
            f"{there.id} on the hub has no config.json with safetensors next to it",
            "name a model that has, with model.checkpoint=ORG/NAME",
        )
    hub.download(listing, config)  # first, so a model that needs code fails within seconds
    _refuse_code(there)
    hub.write_record(listing, files, hub.download(listing, files))


def is_wanted(name: str) -> bool:
    """Return whether to fetch a repository's file.

    It must be in the top folder, and must not have the name of the file in which this project records the download.
    """
    return name.endswith(KINDS) and "/" not in name and name != RECORD


def _refuse_code(there: hub.Repository) -> None:
    config = read_config(there.folder)
    if "auto_map" in config:
        raise PreflightError(
            f"config.json of {there.id} has auto_map={config['auto_map']}: it wants Python code from its repository to run, "
            "and trust_remote_code stays off here",
            "name a model that transformers knows, with model.checkpoint=ORG/NAME",
        )


def fetched(recipe: Recipe) -> Recipe:
    """Return the recipe with every fetched Hugging Face id replaced by its folder, or for a data set of one file by that.

    Do not contact the hub. An id that was not fetched remains.
    """
    root, data, model = recipe.cluster.root, recipe.data, recipe.model

    def source(path: str, option: str) -> str:
        there = fetched_path(data_set(path, root, hub_part(data, option))) if is_remote(path) else None
        return str(there or path)

    heldout = None if data.heldout is None else source(data.heldout, "data.heldout")
    recipe = replace(recipe, data=replace(data, path=source(data.path, "data.path"), heldout=heldout))
    if is_remote(model.checkpoint) and (there := repository(model.checkpoint, root)).files() is not None:
        recipe = replace(recipe, model=replace(model, checkpoint=str(there.folder)))
    return recipe


def local_checkpoint(recipe: Recipe) -> Recipe:
    """Return `fetched(recipe)`. Raise `ConfigError` with the command to type if the model was not fetched."""
    recipe = fetched(recipe)
    if is_remote(recipe.model.checkpoint):
        raise ConfigError(
            f"model.checkpoint={recipe.model.checkpoint} is not on this machine",
            f"run `{commands.of_words('fetch', recipe)}`, or write model.checkpoint=FOLDER of a Hugging Face checkpoint",
        )
    return recipe


def is_remote(path: str) -> bool:
    """Return whether `path` has the form of a hub id and does not exist on this machine."""
    return is_hub_id(path) and not Path(path).exists()


def fetch_all(recipe: Recipe, console: Console) -> None:
    """Fetch everything that the recipe names by a Hugging Face id, the model first, and print a table of it.

    Raise as `fetch` and `data_prep.source_files.local` do. Raise `ConfigError` if the recipe names no Hugging Face id.
    """
    root, data = recipe.cluster.root, recipe.data
    named = [repository(recipe.model.checkpoint, root)] if is_remote(recipe.model.checkpoint) else []
    sources = {data.path: "data.path"} | ({data.heldout: "data.heldout"} if data.heldout else {})
    named += [data_set(path, root, hub_part(data, option)) for path, option in sources.items() if is_remote(path)]
    if not named:
        raise ConfigError(
            f"nothing to fetch: model.checkpoint={recipe.model.checkpoint} and data.path={data.path} are on this machine "
            "or are no Hugging Face ids",
            "write model=qwen3-32b or model.checkpoint=ORG/NAME",
        )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "files", "GB", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for there in named:
        started = time.perf_counter()
        if there.kind == "model":
            fetch(there)
        else:
            local(there.id, root, sources[there.id], hub_part(data, sources[there.id]))
        sizes = [f.stat().st_size for f in there.files() or []]
        seconds = time.perf_counter() - started
        table.add_row(there.id, f"{len(sizes)}", f"{sum(sizes) / 1e9:,.2f}", f"{seconds:,.1f}")
    console.print(table)
    for there in named:
        console.print(f"{there.id}: {there.folder}")
