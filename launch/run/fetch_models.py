"""Models of the Hugging Face hub on this machine: fetched once into `models/ORG--NAME` of `cluster.root`."""

import time
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data_prep import hub
from data_prep.source_files import data_set, is_hub_id, local
from recipes.checkpoint.checkpoint_config import read_config
from recipes.compose import commands
from recipes.config import Recipe
from recipes.errors import ConfigError, PreflightError

RECORD = "limi.json"  # beside the model's own files: which commit they are of, and their hashes
# Weights, their index, configuration, chat template and tokenizer. No code, and no pickles, which are code.
KINDS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")


def repository(name: str, root: str) -> hub.Repository:
    """A hub model's place under `cluster.root`."""
    folder = Path(root) / "models" / name.replace("/", "--")
    return hub.Repository(name, "model", folder, folder / RECORD)


def fetch(there: hub.Repository) -> None:
    """Makes the model whole on this machine; asks nothing of the hub where it is.

    Raises `PreflightError` where the hub does not give it, where it wants code of its own to run, and as `hub.download`.
    """
    if there.files() is not None:
        return
    listing = hub.listing(there)
    files = [f for f in listing.files if is_wanted(f.name)]
    config = [f for f in files if f.name == "config.json"]
    if not config or not any(f.name.endswith(".safetensors") for f in files):
        raise PreflightError(
            f"{there.id} on the hub has no config.json with safetensors beside it",
            "name a model that has, with model.checkpoint=ORG/NAME",
        )
    hub.download(listing, config)  # before hours go by
    _refuse_code(there)
    hub.write_record(listing, files, hub.download(listing, files))


def is_wanted(name: str) -> bool:
    """Whether a repository's file is fetched: of its top folder, and no name that this project gives a file of its own."""
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
    """The recipe with every Hugging Face id that was fetched replaced by its folder, a data set's by its file. Asks nothing
    of the hub; an id that was not fetched stays."""
    root, data, model = recipe.cluster.root, recipe.data, recipe.model

    def source(path: str) -> str:
        files = data_set(path, root).files() if is_remote(path) else None
        return str(files[0]) if files else path

    heldout = None if data.heldout is None else source(data.heldout)
    recipe = replace(recipe, data=replace(data, path=source(data.path), heldout=heldout))
    if is_remote(model.checkpoint) and (there := repository(model.checkpoint, root)).files() is not None:
        recipe = replace(recipe, model=replace(model, checkpoint=str(there.folder)))
    return recipe


def local_checkpoint(recipe: Recipe) -> Recipe:
    """`fetched`, and `ConfigError` with the command to type where the model was not."""
    recipe = fetched(recipe)
    if is_remote(recipe.model.checkpoint):
        raise ConfigError(
            f"model.checkpoint={recipe.model.checkpoint} is not on this machine",
            f"run `{commands.of_words('fetch', recipe)}`, or write model.checkpoint=FOLDER of a Hugging Face checkpoint",
        )
    return recipe


def is_remote(path: str) -> bool:
    """Whether it is an id on the hub, and nothing here."""
    return is_hub_id(path) and not Path(path).exists()


def fetch_all(recipe: Recipe, console: Console) -> None:
    """Fetches what the recipe names by a Hugging Face id, its model first, and shows what came.

    Raises as `fetch` and `data_prep.source_files.local`, and `ConfigError` where the recipe names nothing of the hub.
    """
    root, data = recipe.cluster.root, recipe.data
    named = [repository(recipe.model.checkpoint, root)] if is_remote(recipe.model.checkpoint) else []
    sources = {data.path: "data.path"} | ({data.heldout: "data.heldout"} if data.heldout else {})
    named += [data_set(path, root) for path in sources if is_remote(path)]
    if not named:
        raise ConfigError(
            f"nothing to fetch: model.checkpoint={recipe.model.checkpoint} and data.path={data.path} are here or no Hugging Face "
            "ids",
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
            local(there.id, root, sources[there.id])
        sizes = [f.stat().st_size for f in there.files() or []]
        seconds = time.perf_counter() - started
        table.add_row(there.id, f"{len(sizes)}", f"{sum(sizes) / 1e9:,.2f}", f"{seconds:,.1f}")
    console.print(table)
    for there in named:
        console.print(f"{there.id}: {there.folder}")
