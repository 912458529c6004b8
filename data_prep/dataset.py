"""Contract 2: the packed data set, a folder that is made once and read by every engine.

`manifest.json`: format version; hashes of source, tokenizer files, options, code and files; counts; which proof ran.

`sequences.parquet`: `id` text; `segment, length, supervised` int32; `tokens, loss_spans` list<int32>. A span is
[start, end) of supervised tokens, flattened: start, end, start, end.

`ledger.jsonl`: one line for each input record: id, kept or rejected, why, what was repaired.

A folder is named by the hash of everything it was made from: preparing the same thing again is a cache hit.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.files import sha256, whole_folder, write_text
from recipes.config import Recipe
from recipes.errors import DataError

FORMAT = 1
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("segment", pa.int32()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_spans", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class Dataset:
    """An opened data set. Lists run over sequences, in the order of the source."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def _table(self) -> pa.Table:
        return pq.read_table(self.folder / "sequences.parquet", schema=_SCHEMA).combine_chunks()

    @cached_property
    def ids(self) -> list[str]:
        return self._table["id"].to_pylist()

    @cached_property
    def lengths(self) -> list[int]:
        return self._table["length"].to_pylist()

    @cached_property
    def supervised(self) -> list[int]:
        return self._table["supervised"].to_pylist()

    def tokens(self, sequence: int) -> np.ndarray:
        """[length] int32, read from the table as it lies in memory: lists of Python numbers would take nine times that."""
        return self._table["tokens"][sequence].values.to_numpy()

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """(start, end) of every run of supervised tokens, in order."""
        flat = self._table["loss_spans"][sequence].as_py()
        return list(zip(flat[::2], flat[1::2], strict=True))

    @cached_property
    def trajectory(self) -> list[int]:
        """For every sequence, the number of its trajectory."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(i, len(numbers)) for i in self.ids]


def prepare(recipe: Recipe, source: Path) -> Dataset:
    """The packed data set of `source` for this recipe's model: the cached one, or made now.

    Raises `DataError`; a folder that could not be finished is not left behind.
    """
    if not source.is_file():
        raise DataError(f"no file '{source}'; write data.path=FILE (JSON Lines or a JSON array of trajectories)")
    checkpoint = Path(recipe.model.checkpoint)
    inputs = {
        "format": FORMAT,
        "source": sha256(source),
        "tokenizer": {n: sha256(checkpoint / n) for n in _TOKENIZER_FILES if (checkpoint / n).is_file()},
        "family": recipe.model.family.value,
        "max_tokens": recipe.data.max_tokens,
        "code": {p.name: sha256(p) for p in sorted(Path(__file__).parent.glob("*.py"))},
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(recipe.data.out) / key[:16]
    if not (folder / "manifest.json").is_file():
        with whole_folder(folder) as scratch:
            _build(scratch, recipe, source, checkpoint, {"key": key, "inputs": inputs})
    return open_dataset(folder)


def open_dataset(folder: Path) -> Dataset:
    """Opens a packed data set; its files must be the ones its manifest names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        if sha256(folder / name) != digest:
            raise DataError(f"{folder / name} is not the file its manifest names; remove {folder} to make it again")
    return Dataset(folder, manifest)


def _build(scratch: Path, recipe: Recipe, source: Path, checkpoint: Path, manifest: dict[str, Any]) -> None:
    # Here, not at the top: a cache hit must not pay for importing transformers.
    from rich.progress import track

    from data_prep import limi
    from data_prep.chat import PROOF, Chat, load_tokenizer

    chat = Chat(load_tokenizer(checkpoint), recipe.model.family)
    rows: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    ledger: list[dict[str, Any]] = []
    for trajectory in track(list(limi.read(source)), f"Proving {source.name}"):
        encoded = chat.encode(trajectory)
        if len(encoded.tokens) > recipe.data.max_tokens:
            raise DataError(
                f"{trajectory.id} has {len(encoded.tokens)} tokens, over data.max_tokens={recipe.data.max_tokens}; "
                f"write data.max_tokens={len(encoded.tokens)}"
            )
        spans = [edge for span in encoded.spans for edge in span]
        supervised = sum(end - start for start, end in encoded.spans)
        row = (trajectory.id, 0, len(encoded.tokens), supervised, encoded.tokens, spans)
        for name, value in zip(_SCHEMA.names, row, strict=True):
            rows[name].append(value)
        ledger.append(
            {"id": trajectory.id, "status": "kept", "tokens": len(encoded.tokens), "repairs": trajectory.repairs}
        )
    _refuse_repeats(source, rows["id"])
    pq.write_table(pa.table(rows, schema=_SCHEMA), scratch / "sequences.parquet")
    write_text(scratch / "ledger.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ledger))
    manifest |= {
        "proof": PROOF,
        "counts": {
            "records": len(ledger),
            "sequences": len(rows["id"]),
            "tokens": sum(rows["length"]),
            "supervised": sum(rows["supervised"]),
        },
        "files": {name: sha256(scratch / name) for name in ("sequences.parquet", "ledger.jsonl")},
    }
    write_text(scratch / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _refuse_repeats(source: Path, ids: Sequence[str]) -> None:
    repeated = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if not ids:
        raise DataError(f"'{source}' holds no trajectory")
    if repeated:
        raise DataError(
            f"'{source}' holds the same trajectory more than once: {', '.join(repeated)}; remove the copies"
        )
