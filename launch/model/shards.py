"""A folder of safetensors by its index and the headers of its files: which tensors are where, and what is wrong with them.

Not a number is read, and neither torch nor Megatron is imported.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.model import safetensors_file
from launch.model.hf_folder import INDEX
from launch.model.safetensors_file import Entry
from recipes.errors import CheckpointError

SINGLE = "model.safetensors"  # the one file that needs no index
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of an element, of the dtypes that are trained and exported

Files = dict[str, dict[str, Entry]]  # the tensors of each file


@dataclass(frozen=True)
class Shards:
    """files: {tensor: file}, the index's. entries: of those whose bytes are there. total: bytes of all tensors as the index says,
    where it does. beside: files that belong to no index. faults: of the index and the files."""

    folder: Path
    files: dict[str, str]
    entries: dict[str, Entry]
    total: int | None
    beside: tuple[str, ...]
    faults: tuple[str, ...]


def read(folder: Path, *, alone: bool = False) -> Shards:
    """Raises nothing: what is broken stands in `faults`. alone: a file that is the whole checkpoint needs no index."""
    found: list[str] = []
    total, index = None, {}
    alone = alone and not (folder / INDEX).exists() and (folder / SINGLE).exists()
    if not alone:
        try:
            text = _json(folder / INDEX)
            total, index = (
                (text.get("metadata") or {}).get("total_size"),
                {str(tensor): str(file) for tensor, file in text["weight_map"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.append(f"{INDEX} cannot be read: {error}")
    there = _headers(folder, {*index.values()}, found)
    if alone:
        index = dict.fromkeys(there.get(SINGLE, {}), SINGLE)
    files = index or {name: file for file, held in there.items() for name in held}
    found += _misplaced(index, there, f"beside {SINGLE}" if alone else "and the index does not say so")
    held = {name: there[file][name] for name, file in files.items() if name in there.get(file, {})}
    found += [
        f"{n} has {e.size} bytes, which {e.dtype} {list(e.shape)} has not" for n, e in held.items() if not _fits(e)
    ]
    beside = tuple(sorted(there.keys() - {*index.values()})) if index else ()
    return Shards(folder, files, {n: e for n, e in held.items() if _fits(e)}, total, beside, tuple(found))


def _headers(folder: Path, named: set[str], found: list[str]) -> Files:
    """Of the files of the index and of any other that lies there; those that cannot be read are said in `found`."""
    there: Files = {}
    for file in sorted({*named, *(p.name for p in folder.glob("*.safetensors"))}):
        if not (folder / file).is_file():
            found.append(f"{file} is missing")
            continue
        try:
            there[file] = safetensors_file.entries(folder / file)
        except CheckpointError as error:
            found.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.append(f"'{folder / file}' has a header of another kind ({error}); copy it anew")
    return there


def _misplaced(index: dict[str, str], there: Files, not_said: str) -> list[str]:
    """What the index says and the files do not, and the other way round; tensors of the same two files together."""
    lost, twice, more = (defaultdict[tuple[str, str], list[str]](list) for _ in range(3))
    for name, file in index.items():
        if file in there and name not in there[file]:
            lost[file, ""].append(name)
    for file, held in there.items():
        for name in held if index else ():
            if (said := index.get(name, "")) != file:
                (twice if name in there.get(said, {}) else more)[file, said].append(name)
    return [
        *(f"{some(names)} not in {file}, where the index has {_it(names)}" for (file, _), names in lost.items()),
        *(f"{some(names)} in two shards, {file} and {said}" for (file, said), names in twice.items()),
        *(f"{some(names)} in {file}, {not_said}" for (file, _), names in more.items()),
    ]


def some(names: list[str]) -> str:
    """The first, and how many more: the beginning of a sentence about them."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more are"


def _it(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _fits(entry: Entry) -> bool:
    return entry.size == math.prod(entry.shape) * WIDTHS.get(entry.dtype, 1) or entry.dtype not in WIDTHS


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
