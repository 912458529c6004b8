"""Read the index and the file headers of a safetensors folder: the location of every tensor, and all faults.

No tensor values are read. Neither torch nor Megatron is imported.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from launch.weights import safetensors_file
from launch.weights.hf_folder import INDEX, weight_map
from launch.weights.safetensors_file import Entry
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.errors import CheckpointError

SINGLE = "model.safetensors"  # the one file that needs no index
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # bytes per element of the dtypes that can be trained and exported

Files = dict[str, dict[str, Entry]]  # the tensors of each file


@dataclass(frozen=True)
class Shards:
    """The tensors and faults of a folder.

    files: {tensor: file} from the index. entries: the entries of the tensors whose bytes are present. total: bytes of all
    tensors according to the index, or None. faults: messages about the index and its files. beside: one message for each
    safetensors file that is not in the index.
    """

    folder: Path
    files: dict[str, str]
    entries: dict[str, Entry]
    total: int | None
    faults: tuple[str, ...]
    beside: dict[str, str]


def read_shards(folder: Path, *, alone: bool = False) -> Shards:
    """Return the tensors and faults of a folder; never raise. alone: accept a single `model.safetensors` without an index."""
    found: list[str] = []
    total, index = None, {}
    alone = alone and not (folder / INDEX).exists() and (folder / SINGLE).exists()
    if not alone:
        try:
            index = weight_map(folder)
            total = (json_file.read_json(folder / INDEX, AGAIN).get("metadata") or {}).get("total_size")
        except CheckpointError as error:
            found.append(f"{INDEX} cannot be read: {error.problem}")
        except (OSError, AttributeError) as error:
            found.append(f"{INDEX} cannot be read: {error}")
    own = {SINGLE} if alone else {*index.values()} or {p.name for p in folder.glob("*.safetensors")}
    there, broken = _headers(folder, own)
    if alone:
        index = dict.fromkeys(there.get(SINGLE, {}), SINGLE)
    files = index or {name: file for file, held in there.items() for name in held}
    held = {name: there[file][name] for name, file in files.items() if name in there.get(file, {})}
    found += [*broken.values(), *(_misplaced(index, there) if index else ())]
    found += [
        f"{n} has {e.size} bytes, which does not match {e.dtype} {list(e.shape)}"
        for n, e in held.items()
        if not _fits(e)
    ]
    beside = _beside(
        folder, own, {n: files[n] for n in held}, f"beside {SINGLE}" if alone else "and the index does not say so"
    )
    return Shards(folder, files, {n: e for n, e in held.items() if _fits(e)}, total, tuple(found), beside)


def _headers(folder: Path, names: set[str]) -> tuple[Files, dict[str, str]]:
    """Return the entries of every readable file, and a message for every other file."""
    there: Files = {}
    broken = {}
    for file in sorted(names):
        try:
            if not (folder / file).is_file():
                broken[file] = f"{file} is missing"
            else:
                there[file] = safetensors_file.entries(folder / file)
        except CheckpointError as error:
            broken[file] = str(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            broken[file] = f"'{folder / file}' has a header of another kind ({error}); copy it anew"
    return there, broken


def _misplaced(index: dict[str, str], there: Files) -> list[str]:
    """Return the differences between the index and its files. Tensors with the same pair of files share one message."""
    lost, twice, more = (defaultdict[tuple[str, str], list[str]](list) for _ in range(3))
    for name, file in index.items():
        if file in there and name not in there[file]:
            lost[file, ""].append(name)
    for file, held in there.items():
        for name in held:
            if (indexed_file := index.get(name, "")) != file:
                (twice if name in there.get(indexed_file, {}) else more)[file, indexed_file].append(name)
    return [
        *(f"{some(names)} not in {file}, where the index has {_it(names)}" for (file, _), names in lost.items()),
        *(f"{some(names)} in two shards, {file} and {indexed_file}" for (file, indexed_file), names in twice.items()),
        *(f"{some(names)} in {file}, and the index does not say so" for (file, _), names in more.items()),
    ]


def _beside(folder: Path, own: set[str], files: dict[str, str], not_said: str) -> dict[str, str]:
    there, broken = _headers(folder, {p.name for p in folder.glob("*.safetensors")} - own)
    found = {}
    for file, held in there.items():
        twice = [name for name in held if name in files]
        found[file] = (
            f"{some(twice)} in two shards, {file} and {files[twice[0]]}"
            if twice
            else f"{some([*held])} in {file}, {not_said}"
            if held
            else f"{file} is empty"
        )
    return found | broken


def some(names: list[str]) -> str:
    """Return the start of a sentence: the first name, the number of other names, and the verb."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more are"


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _fits(entry: Entry) -> bool:
    return entry.size == math.prod(entry.shape) * WIDTHS.get(entry.dtype, 1) or entry.dtype not in WIDTHS
