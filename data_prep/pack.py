"""From the records of a source to the files of a packed data set: each record read, proved and written, one by one.

Workers hold one record at a time and the writer a few million tokens, so memory does not grow with the source.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep import options
from data_prep.chat import Chat, Encoded, load_tokenizer
from data_prep.records import Record
from data_prep.sources import Source, source, trajectory
from data_prep.trajectory import Code, Rejected, Trajectory
from recipes.config import Data, Recipe, TooLong
from recipes.errors import DataError

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
FILES = ("sequences.parquet", "conversations.jsonl", "ledger.jsonl")
_ROW_GROUP = 4_000_000  # tokens held before they are written
_SMALL = 8_000_000  # bytes of a source that one process reads sooner than others have started


@dataclass
class Packed:
    """What became of one record: a line of the ledger, and the sequences of every conversation it was kept as."""

    ledger: dict[str, Any]
    conversations: list[tuple[Trajectory, list[Encoded]]] = field(default_factory=list)


class Packer:
    """Packs single records: one in every worker."""

    def __init__(self, recipe: Recipe) -> None:
        self.options: Data = recipe.data
        self.source: Source = source(recipe.data.source)
        self.chat = Chat(load_tokenizer(Path(recipe.model.checkpoint)), recipe.model.family)

    def pack(self, record: Record) -> Packed:
        """The record's ledger line and sequences; what is wrong with a record is in the line, never raised."""
        ledger: dict[str, Any] = {"record": record.place, "id": None, "status": "kept"}
        try:
            said = trajectory(record, self.source)
            content = said.content_hash()
            ledger |= {"id": said.id, "content": content}
            said = options.without_thinking(said, self.options)
            said = options.without_special_tokens(said, self.chat.special, self.options)
            turns, faults = options.supervised(said, self.options)
            ledger |= {"schema_breaks": faults} if faults else {}
            ledger |= {"repairs": said.repairs, **self._after_the_last_turn(said)}
            conversations = self._fitting(said, turns)
        except Rejected as error:
            rejected = {"status": "rejected", "code": error.code.value, "reason": str(error)}
            return Packed(ledger | rejected | {"id": ledger["id"] or error.identity})
        encoded = [e for _, sequences in conversations for e in sequences]
        begins = [e.begins for e in encoded]
        ledger |= {
            "tokens": sum(len(e.tokens) for e in encoded),
            "supervised": sum(t.end - t.start for e in encoded for t in e.turns),
            "turns": len(turns),
            "segments": len(encoded),
        }
        ledger |= {f"segments_by_{why}": begins.count(why) for why in ("history", "tokens") if why in begins}
        ledger |= {"pieces": len(conversations)} if len(conversations) > 1 else {}
        return Packed(ledger, conversations)

    @staticmethod
    def _after_the_last_turn(said: Trajectory) -> dict[str, int]:
        last = max(k for k, m in enumerate(said.messages) if m.role == "assistant")
        rest = len(said.messages) - 1 - last
        return {"messages_after_the_last_turn": rest} if rest else {}

    def _fitting(self, said: Trajectory, turns: list[int]) -> list[tuple[Trajectory, list[Encoded]]]:
        """The whole conversation, or its pieces where it is too long and may be cut."""
        encoded = self.chat.encode(said, turns, self.options.thinking)
        limit = self.options.max_tokens
        longest = max(len(e.tokens) for e in encoded)
        if longest <= limit:
            return [(said, encoded)]
        if self.options.too_long is TooLong.reject:
            raise Rejected(
                Code.too_long,
                f"{longest:,} tokens, over data.max_tokens={limit}; write data.max_tokens={longest}, or data.too_long=split "
                "to cut it before user messages",
            )
        cut = options.pieces(said)
        head = [*range(cut[0][0])]
        found: list[tuple[Trajectory, list[Encoded]]] = []
        while cut:
            fitting: tuple[Trajectory, list[Encoded]] | None = None
            taken = 0
            for count in range(1, len(cut) + 1):
                kept = [*head, *(k for piece in cut[:count] for k in piece)]
                wanted = [n for n, k in enumerate(kept) if k in turns]
                part = said.model_copy(update={"messages": [said.messages[k] for k in kept]})
                made = self.chat.encode(part, wanted, self.options.thinking) if wanted else []
                longest = max((len(e.tokens) for e in made), default=0)
                if longest > limit:
                    break
                fitting, taken = (part, made), count
            if fitting is None:
                raise Rejected(
                    Code.too_long,
                    f"from message {cut[0][0]} to the next user message it has {longest:,} tokens, over data.max_tokens="
                    f"{limit}, and is cut before user messages only; write data.max_tokens={longest}",
                )
            if fitting[1]:
                found.append(fitting)
            cut = cut[taken:]
        return found


def pack(folder: Path, recipe: Recipe, path: Path, total: int) -> dict[str, Any]:
    """Writes the data set's files into `folder` and returns its counts. `total`: bytes of the source.

    Every record is kept or rejected; nothing is raised for a single one.
    """
    counts = dict.fromkeys(("records", "kept", "rejected", "sequences", "tokens", "supervised"), 0)
    contents: dict[str, str] = {}
    ids: set[str] = set()
    writer = _Writer(folder)
    records = source(recipe.data.source).records(path)
    with writer, _progress(path.name, total) as advance:
        for record, packed in _packed(recipe, records, total):
            line = packed.ledger
            identify(packed, contents, ids)
            if packed.conversations:
                writer.write(packed)
            counts["records"] += 1
            counts[line["status"]] += 1
            writer.ledger.write(json.dumps(line, ensure_ascii=True) + "\n")
            for name, key in (("tokens", "tokens"), ("supervised", "supervised"), ("sequences", "segments")):
                counts[name] += line[key] if line["status"] == "kept" else 0
            advance(record.size)
    assert counts["records"] == counts["kept"] + counts["rejected"], "every record is kept or rejected"
    return counts


def identify(packed: Packed, contents: dict[str, str], ids: set[str]) -> None:
    """Names a trajectory that was there before, gives a copy without an id of its own a new one, and rejects an id that
    is given twice. contents: id by content hash, so far; ids: those kept so far."""
    if not packed.conversations:
        return
    line, content = packed.ledger, packed.ledger["content"]
    same = contents.setdefault(content, line["id"])
    made = line["id"] == content[:16]
    if line["id"] in ids and made and same == line["id"]:
        copies = 2 + sum(i.startswith(f"{same}.") for i in ids)
        line["id"] = f"{same}.{copies}"
        packed.conversations = [(t.model_copy(update={"id": line["id"]}), e) for t, e in packed.conversations]
    if line["id"] in ids:
        line |= {
            "status": "rejected",
            "code": Code.duplicate_id.value,
            "reason": f"the id '{line['id']}' is used twice",
        }
        packed.conversations = []
        return
    ids.add(line["id"])
    if same != line["id"]:
        line["same_as"] = same


class _Writer:
    """The data set's three files, written as they grow."""

    def __init__(self, folder: Path) -> None:
        self._parquet = pq.ParquetWriter(folder / "sequences.parquet", SCHEMA)
        self._conversations = (folder / "conversations.jsonl").open("w", encoding="utf-8")
        self.ledger = (folder / "ledger.jsonl").open("w", encoding="utf-8")
        self._rows: list[tuple[str, int, Encoded]] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in (self._parquet, self._conversations, self.ledger):
            file.close()

    def write(self, packed: Packed) -> None:
        segment = 0
        for said, sequences in packed.conversations:
            shown: list[dict[str, Any]] = []
            for encoded in sequences:
                self._rows.append((said.id, segment, encoded))
                turns = [[t.message, t.prompt] for t in encoded.turns]
                shown.append({"segment": segment, "begins": encoded.begins, "turns": turns})
                segment += 1
            line = {"id": said.id, "messages": said.chat(), "tools": said.tools, "sequences": shown}
            self._conversations.write(json.dumps(line, ensure_ascii=False) + "\n")
        if sum(len(e.tokens) for _, _, e in self._rows) > _ROW_GROUP:
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
        self._rows = []


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum([len(a) for a in arrays]))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))


def _packed(recipe: Recipe, records: Iterator[Record], total: int) -> Iterator[tuple[Record, Packed]]:
    """Every record and what became of it, in order; by this process or by several."""
    workers = recipe.data.workers or (1 if total < _SMALL else len(os.sched_getaffinity(0)))
    if workers == 1:
        packer = Packer(recipe)
        yield from ((record, packer.pack(record)) for record in records)
        return
    # Spawned, as this process may have threads of its own.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (recipe,))
    waiting: deque[tuple[Record, Future[Packed]]] = deque()
    try:
        for record in records:
            waiting.append((record, pool.submit(_pack, record)))
            if len(waiting) > 4 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker was ended from outside (out of memory?); write data.workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Packer


def _start_worker(recipe: Recipe) -> None:
    global _worker  # noqa: PLW0603  # one packer a process, made once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker = Packer(recipe)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _pack(record: Record) -> Packed:
    return _worker.pack(record)


class _progress:
    """A bar over the bytes of the source with an estimate of the time left, and the number of records done."""

    def __init__(self, name: str, total: int) -> None:
        self._bar = Progress(
            TextColumn("Proving {task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[records]:,} records"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total, records=0)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda size: self._bar.update(self._task, advance=size, records=self._bar.tasks[0].fields["records"] + 1)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
