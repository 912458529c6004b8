"""The tensors of an export by its index and the headers of its shards, as far as they can be read, against the base's."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.model import hf, safetensors_file
from launch.model.hf_folder import INDEX
from launch.model.safetensors_file import Entry
from launch.model.safetensors_folder import SafetensorsFolder
from launch.sanity.checks import Check
from launch.sanity.files import faults
from recipes.config import Model
from recipes.errors import CheckpointError

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of an element, of the dtypes that an export has
TIED = "lm_head.weight"


@dataclass(frozen=True)
class Shards:
    """files: {tensor: file}, the index's. entries: of those whose bytes are there. faults: of the index and the files."""

    folder: Path
    files: dict[str, str]
    entries: dict[str, Entry]
    faults: tuple[str, ...]


def read(folder: Path) -> Shards:
    """Raises nothing: what is broken stands in `faults`."""
    found: list[str] = []
    total, index = None, {}
    try:
        text = json.loads((folder / INDEX).read_text())
        total, index = text["metadata"]["total_size"], dict(text["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.append(f"{INDEX} cannot be read: {error}")
    there: dict[str, dict[str, Entry]] = {}
    for file in sorted({*index.values(), *(p.name for p in folder.glob("*.safetensors"))}):
        try:
            there[file] = safetensors_file.entries(folder / file)
        except CheckpointError as error:
            found.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.append(f"'{folder / file}' has a header of another kind ({error}); copy it anew")
    files = index or {name: file for file, held in there.items() for name in held}
    found += _misplaced(index, there)
    held = {name: there[file][name] for name, file in files.items() if name in there.get(file, {})}
    found += [
        f"{n} has {e.size} bytes, which {e.dtype} {list(e.shape)} has not" for n, e in held.items() if not _fits(e)
    ]
    size = sum(e.size for e in held.values())
    if len(held) == len(files) and total is not None and total != size:
        found.append(f"the index says {total} bytes, and the tensors have {size}")
    return Shards(folder, files, {n: e for n, e in held.items() if _fits(e)}, tuple(found))


def _misplaced(index: dict[str, str], there: dict[str, dict[str, Entry]]) -> list[str]:
    found = [
        f"{name} is not in {file}, where the index has it"
        for name, file in index.items()
        if file in there and name not in there[file]
    ]
    for file, held in there.items():
        for name in held:
            if index and index.get(name) != file:
                found.append(
                    f"{name} is in two shards, {file} and {index[name]}"
                    if name in there.get(index.get(name, ""), {})
                    else f"{name} is in {file}, and the index does not say so"
                )
    return found


def _fits(entry: Entry) -> bool:
    return entry.size == math.prod(entry.shape) * WIDTHS.get(entry.dtype, 1) or entry.dtype not in WIDTHS


def wanted(base: SafetensorsFolder, m: Model) -> set[str]:
    """Tensors of an export but those of MTP layers. Of a tied output layer either engine may write the copy or leave it out."""
    return {n for n in base.entries if not hf.is_mtp(n, m)} - ({TIED} if m.tied else set())


def checks(shards: Shards, base: SafetensorsFolder, m: Model) -> list[Check]:
    """Names, shapes, dtypes, and the index with its shards."""

    def whole() -> tuple[str, Sequence[str]]:
        return (
            f"{len(shards.entries)} of {len(shards.files)} tensors in {len(set(shards.files.values()))} shards",
            shards.faults,
        )

    def names() -> tuple[str, Sequence[str]]:
        expected = wanted(base, m)
        there = {n for n in shards.files if not hf.is_mtp(n, m)} - ({TIED} if m.tied else set())
        missing, unknown = sorted(expected - there), sorted(there - expected)
        lines = [f"{n} is missing" for n in missing] + [f"{n} is not in the base" for n in unknown]
        return f"{len(expected & there)} of {len(expected)}", lines

    def same(field: str) -> tuple[str, Sequence[str]]:
        pairs = {
            n: (getattr(e, field), getattr(base.entries[n], field))
            for n, e in shards.entries.items()
            if n in base.entries
        }
        lines = [f"{n} is {_shown(a)}, the base's {_shown(b)}" for n, (a, b) in pairs.items() if a != b]
        return f"{len(pairs) - len(lines)} of {len(pairs)}", lines

    return [
        faults.check("shards", "a copy that lost files, bytes or index entries", "all there, none twice", whole),
        faults.check("tensor names", "weights that a server leaves at random", "the base's", names),
        faults.check("tensor shapes", "weights that no server loads", "the base's", lambda: same("shape")),
        faults.check("tensor dtypes", "weights of lost or wasted precision", "the base's", lambda: same("dtype")),
    ]


def _shown(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
