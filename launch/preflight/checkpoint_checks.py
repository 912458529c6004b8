"""Checks of the checkpoint that training starts from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.checks import Check
from launch.preflight import tensor_checks
from launch.preflight.checklist import Found, check
from launch.run.fetch_models import RECORD, local_checkpoint
from launch.weights.hf_folder import INDEX, check_kept
from launch.weights.shards import Shards, read_shards
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN, differences, read_config, remedy
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.plan.shown.plan_words import gigabytes

if TYPE_CHECKING:
    from data_prep.pack.dataset import Dataset

SHOWN = 5  # most faults shown in one row
_SHARD = re.compile(r"-of-(\d+)\.safetensors$")


@dataclass
class Known:
    """Results of one check that later checks need; None if the check failed."""

    shards: Shards | None = None  # set only if all files are whole


def checkpoint_rows(r: Recipe | None) -> list[Check]:
    """Return the rows: whether the checkpoint is whole, and whether it is of the recipe's model. For None nothing is known."""
    known, first = Known(), model(r)
    return [first, weights(r and folder(r), known), tensors(r, known.shards, first.fix)]


def folder(r: Recipe) -> Path | None:
    """Return the checkpoint's folder, or None if it has no config.json."""
    path = Path(r.model.checkpoint)
    return path if (path / "config.json").is_file() else None


@check("model", "training another model than the checkpoint's, which slime does silently")
def model(r: Recipe) -> Found:
    if (here := folder(r)) is None:
        local_checkpoint(r)  # for a model of the hub, raises with the command that fetches it
        raise ConfigError(
            f"no config.json in '{r.model.checkpoint}'{_instead(Path(r.model.checkpoint))}",
            f"write model.checkpoint=FOLDER of a Hugging Face checkpoint of {r.model.name}",
        )
    check_kept(here)
    wrong = differences(r.model, read_config(here))
    if not wrong:
        return Found("as in the checkpoint's config.json", "no difference")
    return Found("\n".join(fault.problem for fault in wrong), "no difference", remedy(r.model, wrong))


@check("weights", "an incomplete download, or files mixed from two downloads")
def weights(folder: Path, known: Known) -> Found:
    there = read_shards(folder, alone=True)
    again = f"download {folder} again, or write model.checkpoint=FOLDER of a whole checkpoint"
    limit = "*.safetensors, all those of the index"
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        return Found(f"no *.safetensors{_instead(folder)}", limit, again)
    names = {*there.files.values(), *there.beside}
    downloads = sorted({found[1] for name in names if (found := _SHARD.search(name))})
    wrong = [f"shards of {len(downloads)} downloads, of {' and of '.join(downloads)} files"] * (len(downloads) > 1)
    wrong += [*there.faults, *there.beside.values()]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    text = "; ".join(wrong[:SHOWN]) + more
    if there.faults:
        return Found(text, limit, again)
    if there.beside:
        return Found(text, limit, _apart(folder, ", ".join(there.beside)))
    known.shards = there
    size = sum(e.size for e in there.entries.values())
    return Found(f"*.safetensors: {len(names)}, {gigabytes(size)} GB", limit)


def _apart(folder: Path, files: str) -> str:
    """Return how to take files out of the folder. A fetched folder must stay unchanged, or it would be re-fetched."""
    if (folder / RECORD).is_file():
        return f"copy {folder} without {files}, and write model.checkpoint=FOLDER of the copy"
    return f"move {files} out of {folder}"


def _instead(folder: Path) -> str:
    """Return what a folder without a checkpoint contains instead, if it is a known kind; otherwise an empty text."""
    kinds = {
        "adapter_config.json": "a LoRA adapter, to be merged into its base first (peft: merge_and_unload, save_pretrained)",
        "*.gguf": "quantised for llama.cpp, which cannot be trained",
        "*.bin": "pickles, which are code: re-save them with transformers' save_pretrained",
        "*.pt*": "pickles, which are code: re-save them with transformers' save_pretrained",
    }
    return next((f", but {there.name}: {what}" for glob, what in kinds.items() for there in folder.glob(glob)), "")


@check("tensors", "training that stops when a rank reads the weights, or that trains another model")
def tensors(r: Recipe, shards: Shards, other: str = "") -> Found:
    """other: the fix of the recipe if `config.json` belongs to another model, because then the tensors do too."""
    m = r.model
    limit = f"{len(tensor_checks.wanted(m)):,} by name, shape and dtype"
    if wrong := [*tensor_checks.faults(m, shards.entries)]:
        fixes = [other] if other else dict.fromkeys(fault.fix for fault in wrong)
        return Found("\n".join(fault.problem for fault in wrong), limit, "; ".join(fixes))
    if odd := [*tensor_checks.oddities(m, shards.entries)]:
        return Found("\n".join(o.problem for o in odd), limit, "; ".join(o.fix for o in odd), odd=True)
    return Found(f"as those of {m.name}", limit)


@check("code", "code in a checkpoint, which slime would run: it trusts every checkpoint")
def code(folder: Path) -> Found:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    settings = ("config.json", "tokenizer_config.json")
    mapped = [
        name
        for name in settings
        if (folder / name).is_file() and "auto_map" in json_file.read_json(folder / name, AGAIN)
    ]
    if not files and not mapped:
        return Found("none", "no *.py, no auto_map")
    text = [*files, *(f"auto_map in {name}" for name in mapped)]
    fixes = [f"remove {', '.join(files)} from {folder}"] * bool(files)
    fixes += [f"take auto_map out of {folder / name}" for name in mapped]
    return Found(", ".join(text), "no *.py, no auto_map", "; ".join(fixes))


@check("tokenizer", "a checkpoint with another tokenizer or chat template than the data was packed with")
def tokenizer(r: Recipe, packed: dict[str, "Dataset"]) -> Found:
    from data_prep.pack.dataset import tokenizer_hashes

    here = tokenizer_hashes(Path(r.model.checkpoint))
    wrong = []
    for name, data in packed.items():
        packed_with = data.manifest["inputs"]["tokenizer"]
        differing = [file for file in sorted({*here, *packed_with}) if here.get(file) != packed_with.get(file)]
        wrong += [f"{name} data has another {', '.join(differing)}"] if differing else []
    if wrong:
        fix = (
            "write model.checkpoint= of the checkpoint it was packed with, or re-pack it for this one: make data, with the same "
            "overrides"
        )
        return Found("; ".join(wrong), "those of the data set", fix)
    return Found(", ".join(here), "those of the data set")
