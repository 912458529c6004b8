"""Contract 2: the packed data set, a folder that is written once and read by every engine.

`manifest.json`: format version; hashes of source, tokenizer files, options, code and files; counts; which proof ran.

`sequences.parquet`: `id` text; `segment, length, supervised` int32; `tokens, loss_spans` list<int32>. A span is
[start, end) of supervised tokens, flattened: start, end, start, end.

`conversations.jsonl`: the conversations behind the sequences: `id`, `messages`, `tools`, `sequences`, and by index of the message its
`unsupervised` characters. Each sequence has its `segment`, why it begins, and for each span in order [index of the message, tokens of
its prompt].

`lengths.svg`: a plot of the sequence lengths.

`ledger.jsonl`: one line per input record: its position in the source, its id, kept or rejected (with code and reason), and
its repairs.

The folder name is a hash of all inputs, so preparing the same inputs a second time is a cache hit.
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
from data_prep.given import GIVEN, given_file
from data_prep.reading import SERVER
from data_prep.recognise import AUTO, other_form, recognised
from data_prep.records import files_of
from data_prep.source_files import check_tokenizer, hub_part, local
from data_prep.trajectory import Code
from recipes import json_file
from recipes.compose.kinds import shown
from recipes.config import Data, Recipe
from recipes.errors import DataError
from recipes.paths import REPO

FORMAT = 2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "jsonschema")
# Options for paths and processing. They do not change the content.
_NOT_CONTENT = ("path", "heldout", "revision", "split", "out", "workers", "max_rejected", "tools", "system")
_OF_ANOTHER_FORM = (Code.utf8, Code.json, Code.shape, Code.no_supervised)  # rejections of a file that is something else
_LISTED = 20  # rejections that an error lists


@dataclass(frozen=True)
class Dataset:
    """An opened data set. List properties have one item per sequence, in source order."""

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
        """For every sequence, its index within its trajectory."""
        return self._read("segment")["segment"].to_pylist()

    @cached_property
    def lengths(self) -> list[int]:
        return self._read("length")["length"].to_pylist()

    @cached_property
    def supervised(self) -> list[int]:
        return self._read("supervised")["supervised"].to_pylist()

    def tokens(self, sequence: int) -> np.ndarray:
        """Return the [length] int32 tokens as a view of the Arrow table. Lists of Python integers would take nine times the memory."""
        return self._tokens["tokens"][sequence].values.to_numpy()

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """Return (start, end) of every run of supervised tokens, in order."""
        flat = self._tokens["loss_spans"][sequence].as_py()
        return list(zip(flat[::2], flat[1::2], strict=True))

    @cached_property
    def trajectory(self) -> list[int]:
        """For every sequence, the index of its trajectory."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(i, len(numbers)) for i in self.ids]

    @cached_property
    def turns(self) -> list[list[int]]:
        """For every sequence, the indices of the messages that its spans supervise."""
        lines = [s for conversation in self.conversations() for s in conversation["sequences"]]
        return [[message for message, _ in sequence["turns"]] for sequence in lines]

    @cached_property
    def thinks(self) -> bool:
        """Whether any assistant message has thinking."""
        return any(m.get("reasoning_content") for c in self.conversations() for m in c["messages"])

    def conversations(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of `conversations.jsonl`."""
        return _json_lines(self.folder / "conversations.jsonl")

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of `ledger.jsonl`."""
        return _json_lines(self.folder / "ledger.jsonl")


def prepare(recipe: Recipe, path: str, option: str = "data.path") -> Dataset:
    """Return the packed data set of the trajectories at `path` for this recipe's model. Pack it now unless it is cached.

    option: the option that gave the path, for messages. Raise `DataError` if more records are rejected than
    `data.max_rejected`; the folder remains, for its ledger. If packing fails, no partial folder remains.
    """
    source = local(path, recipe.cluster.root, option, hub_part(recipe.data, option))
    if recipe.data.source == AUTO:
        recipe = recognised(recipe, source, option)
    checkpoint = Path(recipe.model.checkpoint)
    files = files_of(source)
    if not files:
        raise DataError(f"the folder '{source}' has no file of records", f"write {option}=FILE or FOLDER")
    check_tokenizer(checkpoint)
    inputs = {
        "format": FORMAT,
        "source": source_hashes(source),
        "tokenizer": tokenizer_hashes(checkpoint),
        "family": recipe.model.family.value,
        "options": options(recipe),
        "template_options": recipe.model.template_options,
        "given": given_hashes(recipe.data),
        "server": SERVER,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "code": {str(p.relative_to(REPO)): sha256(p) for p in code()},
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = Path(recipe.data.out) / key[:16]
    if not (folder / "manifest.json").is_file():
        # Imported here: a cache hit must not pay for the imports.
        from data_prep.pack import plot
        from data_prep.pack.pack import FILES, PROOF, pack

        with whole_folder(folder) as scratch:
            counts = pack(scratch, recipe, source, sum(f.stat().st_size for f in files))
            hashes = {name: sha256(scratch / name) for name in FILES}
            manifest = {"key": key, "inputs": inputs, "proof": PROOF, "counts": counts, "files": hashes}
            if counts["sequences"]:
                dataset = Dataset(scratch, manifest)
                plot.lengths(scratch / "lengths.svg", dataset.lengths, dataset.supervised)
            write_text(scratch / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return _accepted(open_dataset(folder), recipe.data, source, f"{option}={path}")


def code() -> list[Path]:
    """Return the code files that can change the text of a trajectory or its supervised tokens."""
    sample = REPO / "data_prep" / "sample"
    modules = [p for p in (REPO / "data_prep").rglob("*.py") if sample not in p.parents]
    return sorted([*modules, *(REPO / "recipes" / "families").glob("*.py")])


def source_hashes(source: Path) -> str | dict[str, str]:
    """Return the SHA-256 of a file of trajectories; for a folder, return the SHA-256 of its files by name."""
    return {str(f.relative_to(source)): sha256(f) for f in files_of(source)} if source.is_dir() else sha256(source)


def given_hashes(data: Data) -> dict[str, str]:
    """Return the SHA-256 of the files that give tools and a system prompt to records without."""
    return {name: sha256(given_file(path, name)) for name in GIVEN if (path := getattr(data, name))}


def options(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of `data` that determine the content of a packed data set, by name."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(recipe.data).items() if k not in _NOT_CONTENT}


def tokenizer_hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 by name of the tokenizer files, including the chat template. They determine the tokens of a conversation."""
    return {n: sha256(checkpoint / n) for n in _TOKENIZER_FILES if (checkpoint / n).is_file()}


def open_dataset(folder: Path) -> Dataset:
    """Open a packed data set. Raise `DataError` if a file differs from the hash in the manifest."""
    fix = f"remove {folder} to pack it once more"
    manifest = json_file.read_json(folder / "manifest.json", fix, DataError)
    with json_file.shape(folder / "manifest.json", fix, DataError):
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != digest:
                raise DataError(f"{folder / name} is not the file its manifest names", fix)
    return Dataset(folder, manifest)


def _accepted(data: Dataset, options: Data, path: Path, source: str) -> Dataset:
    counts, max_rejected = data.manifest["counts"], options.max_rejected
    if not counts["records"]:
        raise DataError(f"'{source}' holds no trajectory")
    strange = not counts["kept"] and all(line["code"] in _OF_ANOTHER_FORM for line in data.ledger())
    if strange and (other := other_form(path, options.source)):
        what, fix = other
        raise DataError(
            f"'{source}': {what}, and data={options.source} reads none of its {counts['records']} records", fix
        )
    if counts["rejected"] > max_rejected or not counts["kept"]:
        rejected = [line for line in data.ledger() if line["status"] == "rejected"]
        listed = [
            shown(f"  {line['record']}{' ' + line['id'] if line['id'] else ''}: {line['code']}: {line['reason']}")
            for line in rejected[:_LISTED]
        ]
        codes = Counter(line["code"] for line in rejected)
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
    """Return (id, id of the earlier trajectory with the same content) for every repeated trajectory."""
    return [(line["id"], line["same_as"]) for line in data.ledger() if "same_as" in line]


def overlap(data: Dataset, other: Dataset) -> list[tuple[str, str]]:
    """Return (id, id in `other`) for every trajectory whose content is in both data sets."""
    other_ids = {line["content"]: line["id"] for line in other.ledger() if line["status"] == "kept"}
    lines = [line for line in data.ledger() if line["status"] == "kept"]
    return [(line["id"], other_ids[line["content"]]) for line in lines if line["content"] in other_ids]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
