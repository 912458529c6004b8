"""Contract 2: the packed data set, a folder that is made once and read by every engine.

`manifest.json`: format version; hashes of source, tokenizer files, options, code and files; counts; which proof ran.

`sequences.parquet`: `id` text; `segment, length, supervised` int32; `tokens, loss_spans` list<int32>. A span is
[start, end) of supervised tokens, flattened: start, end, start, end.

`conversations.jsonl`: what the sequences were made of: `id`, `messages`, `tools`, and for each of its `sequences` the
`segment`, why it begins, and for each span in order [number of the message, tokens of its prompt].

`lengths.svg`: how long the sequences are.

`ledger.jsonl`: one line for each input record: place, id, kept or rejected with code and reason, what was repaired.

A folder is named by the hash of everything it was made from: preparing the same thing again is a cache hit.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import sha256, whole_folder, write_text
from data_prep.source_files import check_tokenizer, local
from recipes import json_file
from recipes.config import Recipe
from recipes.errors import DataError
from recipes.paths import REPO

FORMAT = 2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "jsonschema")
# What decides where the data is and how it is made, not what is in it.
_NOT_CONTENT = ("path", "heldout", "out", "workers", "max_rejected")
_LISTED = 20  # rejections that an error lists


@dataclass(frozen=True)
class Dataset:
    """An opened data set. Lists run over sequences, in the order of the source."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def _tokens(self) -> pa.Table:
        return self._read("tokens", "loss_spans").combine_chunks()

    def _read(self, *columns: str) -> pa.Table:
        return pq.read_table(self.folder / "sequences.parquet", columns=[*columns])

    @cached_property
    def ids(self) -> list[str]:
        return self._read("id")["id"].to_pylist()

    @cached_property
    def segments(self) -> list[int]:
        """For every sequence, its number in its trajectory."""
        return self._read("segment")["segment"].to_pylist()

    @cached_property
    def lengths(self) -> list[int]:
        return self._read("length")["length"].to_pylist()

    @cached_property
    def supervised(self) -> list[int]:
        return self._read("supervised")["supervised"].to_pylist()

    def tokens(self, sequence: int) -> np.ndarray:
        """[length] int32, read from the table as it lies in memory: lists of Python numbers would take nine times that."""
        return self._tokens["tokens"][sequence].values.to_numpy()

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """(start, end) of every run of supervised tokens, in order."""
        flat = self._tokens["loss_spans"][sequence].as_py()
        return list(zip(flat[::2], flat[1::2], strict=True))

    @cached_property
    def trajectory(self) -> list[int]:
        """For every sequence, the number of its trajectory."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(i, len(numbers)) for i in self.ids]

    @cached_property
    def turns(self) -> list[list[int]]:
        """For every sequence, the numbers of the messages that its spans supervise."""
        lines = [s for conversation in self.conversations() for s in conversation["sequences"]]
        return [[message for message, _ in sequence["turns"]] for sequence in lines]

    @cached_property
    def thinks(self) -> bool:
        """Whether any answer has thinking."""
        return any(m.get("reasoning_content") for c in self.conversations() for m in c["messages"])

    def conversations(self) -> Iterator[dict[str, Any]]:
        """The lines of `conversations.jsonl`."""
        return _json_lines(self.folder / "conversations.jsonl")

    def ledger(self) -> Iterator[dict[str, Any]]:
        """The lines of `ledger.jsonl`."""
        return _json_lines(self.folder / "ledger.jsonl")


def prepare(recipe: Recipe, path: str, option: str = "data.path") -> Dataset:
    """The packed data set of the trajectories at `path` for this recipe's model: the cached one, or made now. option: what
    gave the path, for messages.

    Raises `DataError` where more records are rejected than `data.max_rejected`; the folder stays for its ledger. A folder
    that could not be finished is not left behind.
    """
    source = local(path, recipe.cluster.root, option)
    checkpoint = Path(recipe.model.checkpoint)
    files = _files(source)
    if not files:
        raise DataError(f"no *.json in the folder '{source}'", f"write {option}=FILE or FOLDER")
    check_tokenizer(checkpoint)
    inputs = {
        "format": FORMAT,
        "source": source_hashes(source),
        "tokenizer": tokenizer_hashes(checkpoint),
        "family": recipe.model.family.value,
        "options": options(recipe),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "code": {str(p.relative_to(REPO)): sha256(p) for p in code()},
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(recipe.data.out) / key[:16]
    if not (folder / "manifest.json").is_file():
        # Here, not at the top: a cache hit must not pay for the imports.
        from data_prep.pack import plot
        from data_prep.pack.pack import FILES, PROOF, pack

        with whole_folder(folder) as scratch:
            counts = pack(scratch, recipe, source, sum(f.stat().st_size for f in files))
            hashes = {name: sha256(scratch / name) for name in FILES}
            manifest = {"key": key, "inputs": inputs, "proof": PROOF, "counts": counts, "files": hashes}
            if counts["sequences"]:
                made = Dataset(scratch, manifest)
                plot.lengths(scratch / "lengths.svg", made.lengths, made.supervised)
            write_text(scratch / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return _accepted(open_dataset(folder), recipe.data.max_rejected, f"{option}={path}")


def code() -> list[Path]:
    """Return the files that can change the text of a trajectory, or what of it is supervised."""
    sample = REPO / "data_prep" / "sample"
    ours = [p for p in (REPO / "data_prep").rglob("*.py") if sample not in p.parents]
    return sorted([*ours, *(REPO / "recipes" / "families").glob("*.py")])


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("*.json")) if source.is_dir() else [source]


def source_hashes(source: Path) -> str | dict[str, str]:
    """SHA-256 of a file of trajectories; of a folder's files by name."""
    return {f.name: sha256(f) for f in _files(source)} if source.is_dir() else sha256(source)


def options(recipe: Recipe) -> dict[str, Any]:
    """The fields of `data` that decide what a packed data set holds, by name."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(recipe.data).items() if k not in _NOT_CONTENT}


def tokenizer_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by name of the files that decide which tokens a conversation becomes, the chat template among them."""
    return {n: sha256(checkpoint / n) for n in _TOKENIZER_FILES if (checkpoint / n).is_file()}


def open_dataset(folder: Path) -> Dataset:
    """Opens a packed data set; its files must be the ones its manifest names."""
    again = f"remove {folder} to make it again"
    manifest = json_file.read(folder / "manifest.json", again, DataError)
    with json_file.shape(folder / "manifest.json", again, DataError):
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise DataError(f"{folder / name} is not the file its manifest names", again)
    return Dataset(folder, manifest)


def _accepted(data: Dataset, max_rejected: int, source: str) -> Dataset:
    counts = data.manifest["counts"]
    if not counts["records"]:
        raise DataError(f"'{source}' holds no trajectory")
    if counts["rejected"] > max_rejected or not counts["kept"]:
        rejected = [line for line in data.ledger() if line["status"] == "rejected"]
        listed = [
            f"  {n['record']}{' ' + n['id'] if n['id'] else ''}: {n['code']}: {n['reason']}" for n in rejected[:_LISTED]
        ]
        codes = Counter(n["code"] for n in rejected)
        more = f"  … and {len(rejected) - _LISTED} more" if len(rejected) > _LISTED else ""
        allowed = f"data.max_rejected={max_rejected} allows {max_rejected}" if counts["kept"] else "and none is left"
        fix = f"; to go on without them write data.max_rejected={counts['rejected']}" if counts["kept"] else ""
        raise DataError(
            f"{counts['rejected']} of {counts['records']} records of '{source}' are rejected "
            f"({', '.join(f'{n} {code}' for code, n in codes.most_common())}), {allowed}:\n"
            + "\n".join([*listed, *([more] if more else [])])
            + f"\nAll are in {data.folder / 'ledger.jsonl'}{fix}"
        )
    return data


def repeated(data: Dataset) -> list[tuple[str, str]]:
    """(id, id of the earlier trajectory that says the same), for all that come more than once."""
    return [(line["id"], line["same_as"]) for line in data.ledger() if "same_as" in line]


def overlap(data: Dataset, other: Dataset) -> list[tuple[str, str]]:
    """(id, id) of trajectories that say the same in both data sets."""
    theirs = {line["content"]: line["id"] for line in other.ledger() if line["status"] == "kept"}
    mine = [line for line in data.ledger() if line["status"] == "kept"]
    return [(line["id"], theirs[line["content"]]) for line in mine if line["content"] in theirs]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
