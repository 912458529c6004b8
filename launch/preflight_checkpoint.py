"""What is checked of the checkpoint that training starts from."""

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.checklist import Found, check
from launch.fetch import local_checkpoint
from recipes.checkpoint_config import differences, remedy
from recipes.config import Recipe
from recipes.errors import ConfigError
from recipes.plan_words import gigabytes

if TYPE_CHECKING:
    from data_prep.dataset import Dataset

INDEX = "model.safetensors.index.json"


def folder(r: Recipe) -> Path | None:
    """The checkpoint's, where it is one."""
    found = Path(r.model.checkpoint)
    return found if (found / "config.json").is_file() else None


@check("model", "training another model than the checkpoint's, which slime does without a word")
def model(r: Recipe) -> Found:
    if (here := folder(r)) is None:
        local_checkpoint(r)  # says how to fetch one of the hub
        raise ConfigError(
            f"no config.json in '{r.model.checkpoint}'",
            f"write model.checkpoint=FOLDER of a Hugging Face checkpoint of {r.model.name}",
        )
    found = differences(r.model, _json(here / "config.json"))
    if not found:
        return Found("as in the checkpoint's config.json", "no difference")
    return Found("\n".join(fault.problem for fault in found), "no difference", remedy(r.model, found))


@check("weights", "a download that is not whole")
def weights(folder: Path) -> Found:
    shards = {path.name for path in folder.glob("*.safetensors")}
    again = f"download {folder} again, or write model.checkpoint=FOLDER of a whole checkpoint"
    limit = "*.safetensors, all of the index"
    if not shards:
        return Found("no *.safetensors", limit, again)
    if not (folder / INDEX).is_file():
        if len(shards) > 1:
            return Found(f"{len(shards)} *.safetensors and no {INDEX}", limit, again)
        wanted: dict[str, set[str]] = {name: set() for name in shards}
    else:
        wanted = defaultdict(set)
        for tensor, shard in _json(folder / INDEX)["weight_map"].items():
            wanted[shard].add(tensor)
    wrong = [f"{name}: {fault}" for name in sorted(wanted) if (fault := _fault(folder / name, wanted[name]))]
    if wrong:
        return Found(f"{len(wrong)} of {len(wanted)} files: {'; '.join(wrong[:5])}", limit, again)
    size = sum((folder / name).stat().st_size for name in wanted)
    return Found(f"*.safetensors: {len(wanted)}, {gigabytes(size)} GB", limit)


def _fault(shard: Path, tensors: set[str]) -> str:
    """What is wrong with a shard that should hold these tensors; its header tells its size."""
    from safetensors import safe_open

    if not shard.is_file():
        return "missing"
    try:
        with safe_open(shard, "np") as file:
            lacking = tensors - {*file.keys()}
    except Exception as error:  # safetensors' own, of a file that is cut off or something else
        return str(error)
    return f"lacks {min(lacking)}" if lacking else ""


@check("code", "code from a checkpoint, which slime runs: it trusts every one")
def code(folder: Path) -> Found:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    settings = ("config.json", "tokenizer_config.json")
    mapped = [name for name in settings if (folder / name).is_file() and "auto_map" in _json(folder / name)]
    if not files and not mapped:
        return Found("none", "no *.py, no auto_map")
    text = [*files, *(f"auto_map in {name}" for name in mapped)]
    mends = [f"remove {', '.join(files)} from {folder}"] * bool(files)
    mends += [f"take auto_map out of {folder / name}" for name in mapped]
    return Found(", ".join(text), "no *.py, no auto_map", "; ".join(mends))


@check("tokenizer", "a checkpoint that reads other tokens, or another chat template, than the data was packed with")
def tokenizer(r: Recipe, packed: dict[str, "Dataset"]) -> Found:
    from data_prep.dataset import tokenizer_hashes

    here = tokenizer_hashes(Path(r.model.checkpoint))
    wrong = []
    for name, data in packed.items():
        theirs = data.manifest["inputs"]["tokenizer"]
        unlike = [file for file in sorted({*here, *theirs}) if here.get(file) != theirs.get(file)]
        wrong += [f"{name} data has another {', '.join(unlike)}"] if unlike else []
    if wrong:
        mend = "write model.checkpoint= of the checkpoint it was packed with, or pack it for this one: make data, with the same words"
        return Found("; ".join(wrong), "those of the data set", mend)
    return Found(", ".join(here), "those of the data set")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
