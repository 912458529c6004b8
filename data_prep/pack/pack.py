"""Pack the records of a source into the files of a data set: read, prove and write each record in turn.

A worker has one record in memory and the writer a few million tokens, so memory does not grow with the source.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.records import Record
from data_prep.sources import source
from data_prep.text.sequences import Encoded, Packed
from data_prep.trajectory import Code
from data_prep.workers import pool
from recipes.config import Recipe
from recipes.errors import DataError, LimiError

if TYPE_CHECKING:
    # For type checks only: if there are workers, only they import transformers.
    from data_prep.pack.packer import Packer

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("segment", pa.int32()),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_spans", pa.list_(pa.int32())),
    ]
)
PROOF = (
    "literal: for every supervised turn k, the text before it equals the rendered prompt of messages[:k], and its tokens "
    "that prompt's tokens"
)
FILES = ("sequences.parquet", "conversations.jsonl", "ledger.jsonl")
_ROW_GROUP = 4_000_000  # tokens buffered before they are written
_SMALL = 8_000_000  # bytes; below this, one process finishes before workers would have started


def pack(folder: Path, recipe: Recipe, path: Path, total: int) -> dict[str, int]:
    """Write the data set's files into `folder` and return its counts. total: bytes of the source.

    Every record is either kept or rejected. A single bad record raises no error.
    """
    counts = dict.fromkeys(("records", "kept", "rejected", "sequences", "tokens", "supervised"), 0)
    seen = Seen()
    records = source(recipe.data.source).records(path)
    with (
        _Writer(folder) as writer,
        _progress(path.name, total) as advance,
        closing(_packed(recipe, records, total)) as all_packed,
    ):
        for record, packed in all_packed:
            line = seen.identify(packed)
            writer.write(packed)
            counts["records"] += 1
            counts[line["status"]] += 1
            if line["status"] == "kept":
                for name, key in (("tokens", "tokens"), ("supervised", "supervised"), ("sequences", "segments")):
                    counts[name] += line[key]
            advance(record.size)
    assert counts["records"] == counts["kept"] + counts["rejected"], "every record is kept or rejected"
    return counts


class Seen:
    """The kept records so far: their ids, and the id of each content."""

    def __init__(self) -> None:
        self._ids: dict[str, str] = {}  # position of each record in the source, by its id
        self._contents: dict[str, str] = {}  # id by content hash
        self._copies: Counter[str] = Counter()

    def identify(self, packed: Packed) -> dict[str, Any]:
        """Complete and return the record's ledger line.

        A copy gets `same_as`; a copy without an id of its own also gets a new id. A record whose id was used before is
        rejected.
        """
        line = packed.ledger
        if not packed.conversations:
            return line
        content = line["content"]
        if line["id"] == content[:16]:
            self._copies[content] += 1
            if self._copies[content] > 1:
                line["id"] = f"{content[:16]}.{self._copies[content]}"
                packed.conversations = [
                    (trajectory.model_copy(update={"id": line["id"]}), encoded)
                    for trajectory, encoded in packed.conversations
                ]
        if first := self._ids.get(line["id"]):
            packed.conversations = []
            reason = f"the id '{line['id']}' is used twice, first at {first}"
            line |= {"status": "rejected", "code": Code.duplicate_id.value, "reason": reason}
            return line
        self._ids[line["id"]] = line["record"]
        same = self._contents.setdefault(content, line["id"])
        if same != line["id"]:
            line["same_as"] = same
        return line


class _Writer:
    """Writer of the data set's three files. It writes incrementally."""

    def __init__(self, folder: Path) -> None:
        self._parquet = pq.ParquetWriter(folder / "sequences.parquet", SCHEMA)
        self._conversations = (folder / "conversations.jsonl").open("w", encoding="utf-8")
        self._ledger = (folder / "ledger.jsonl").open("w", encoding="utf-8")
        self._rows: list[tuple[str, int, Encoded]] = []
        self._tokens = 0  # in `_rows`

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in (self._parquet, self._conversations, self._ledger):
            file.close()

    def write(self, packed: Packed) -> None:
        segment = 0
        for trajectory, sequences in packed.conversations:
            entries: list[dict[str, Any]] = []
            for encoded in sequences:
                self._rows.append((trajectory.id, segment, encoded))
                self._tokens += len(encoded.tokens)
                turns = [[t.message, t.prompt] for t in encoded.turns]
                entries.append({"segment": segment, "begins": encoded.begins, "turns": turns})
                segment += 1
            unlearned = {str(k): m.unsupervised for k, m in enumerate(trajectory.messages) if m.unsupervised}
            line = {
                "id": trajectory.id,
                "messages": trajectory.chat(),
                "tools": trajectory.tools,
                "sequences": entries,
                **({"metadata": trajectory.metadata} if trajectory.metadata else {}),
                **({"unsupervised": unlearned} if unlearned else {}),
            }
            self._conversations.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._ledger.write(json.dumps(packed.ledger) + "\n")
        if self._tokens > _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        spans = [[edge for t in e.turns for edge in (t.start, t.end)] for _, _, e in self._rows]
        columns = [
            pa.array([i for i, _, _ in self._rows], pa.string()),
            pa.array([s for _, s, _ in self._rows], pa.int32()),
            pa.array([len(e.tokens) for _, _, e in self._rows], pa.int32()),
            pa.array([sum(t.end - t.start for t in e.turns) for _, _, e in self._rows], pa.int32()),
            _lists([e.tokens for _, _, e in self._rows]),
            _lists([np.array(s, dtype=np.int32) for s in spans]),
        ]
        self._parquet.write_table(pa.table(columns, schema=SCHEMA))
        self._rows, self._tokens = [], 0


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum([len(a) for a in arrays]))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))


def _packed(recipe: Recipe, records: Iterator[Record], total: int) -> Generator[tuple[Record, Packed]]:
    """Yield every record with its result, in order. Pack in this process or in several workers."""
    workers = recipe.data.workers or (1 if total < _SMALL else len(os.sched_getaffinity(0)))
    if workers == 1:
        from data_prep.pack.packer import Packer

        packer = Packer(recipe)
        yield from ((record, packer.pack(record)) for record in records)
        return
    waiting: deque[tuple[Record, Future[Packed]]] = deque()
    try:
        with pool(workers, "transformers.models.auto.tokenization_auto", _start_worker, recipe) as processes:
            for record in records:
                waiting.append((record, processes.submit(_pack, record)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker was killed from outside (out of memory?)", "write data.workers=1") from error


_worker: "Packer | LimiError"


def _start_worker(recipe: Recipe) -> None:
    global _worker  # noqa: PLW0603  # one per process, created once
    from data_prep.pack.packer import Packer

    try:
        _worker = Packer(recipe)
    except LimiError as error:
        _worker = error  # raised when the parent asks for the first result


def _pack(record: Record) -> Packed:
    if isinstance(_worker, LimiError):
        raise _worker
    return _worker.pack(record)


class _progress:
    """A progress bar over the bytes of the source, with the number of records done and the estimated time left."""

    def __init__(self, name: str, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("Proving {task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[records]:,} records"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total, records=0)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda size: self._bar.update(self._task, advance=size, records=self._bar.tasks[0].fields["records"] + 1)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
