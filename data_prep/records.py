"""Read the raw records of a source one by one: JSON Lines, a JSON array, Parquet, or one JSON document per file; compressed with gzip
or zstd; a file or a folder of files. What a file is, its first bytes say.

Only the current record is in memory, of Parquet the current batch, so memory does not grow with the file.
"""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.trajectory import Code, Rejected
from recipes.errors import DataError

_CHUNK = 1 << 20
_WHOLE = 1 << 28  # bytes; a larger file is read by lines, also if its first one is no JSON
_BATCH = 64  # rows of Parquet in memory
_ENDINGS = (".jsonl", ".json", ".ndjson", ".parquet")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_WHITESPACE = " \t\n\r"
_MAX_DEPTH = 64
_TOO_DEEP = f"nested deeper than {_MAX_DEPTH} levels"


@dataclass(frozen=True)
class Record:
    """One unparsed record.

    place: line, number or file name of the record, for messages. raw: its JSON, not yet parsed. size: bytes read for it.
    """

    place: str
    raw: bytes
    size: int


def json_records(path: Path) -> Iterator[Record]:
    """Yield every record of a file, or of the files of a folder, in order: lines of JSON Lines, elements of a JSON array, rows of
    Parquet, or the one document of a JSON file.

    Raise `DataError` if a folder has no such file, if a file is of another kind, or if an array is malformed: the records after the
    fault cannot be separated.
    """
    if not path.is_dir():
        yield from documents(path)
        return
    files = files_of(path)
    if not files:
        raise DataError(f"'{path}' has no file that ends in {', '.join(_ENDINGS)}", "write data.path=FILE")
    for file in files:
        for record in documents(file):
            place = record.place if record.place == file.name else f"{file.relative_to(path)}, {record.place}"
            yield Record(place, record.raw, record.size)


def files_of(path: Path) -> list[Path]:
    """Return the file, or those in a folder and below it that may hold records, by path. Hidden ones do not count."""
    if not path.is_dir():
        return [path]
    found = [f for f in sorted(path.rglob("*")) if f.name.removesuffix(".gz").removesuffix(".zst").endswith(_ENDINGS)]
    return [f for f in found if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)]


def _of_file(path: Path) -> Iterator[Record]:
    with path.open("rb") as raw:
        magic = raw.read(4)
        if magic == b"PAR1":
            yield from _rows(path)
            return
        if magic == b"PK\x03\x04":
            raise DataError(
                f"'{path}' is a zip archive", "unpack it, and write data.path=FILE or FOLDER of what is inside"
            )
        kind = _compression(magic)
        raw.seek(0)
        with _decompressed(raw) as stream:
            file = io.BufferedReader(stream, _CHUNK)
            start = b""
            while not start and (read := file.peek(_CHUNK)):
                start = read.removeprefix(b"\xef\xbb\xbf").lstrip()
                if not start:
                    file.read(len(read))
            found = _array(file, path) if start.startswith(b"[") else _lines(file)
            if kind is None:
                yield from found
                return
            last = 0
            for record in found:
                yield Record(record.place, record.raw, raw.tell() - last)
                last = raw.tell()


def _compression(magic: bytes) -> str | None:
    return next((name for begins, name in _COMPRESSED.items() if magic.startswith(begins)), None)


def _decompressed(raw: BinaryIO) -> Any:
    """Return a stream of a file's bytes as they were before compression. raw: open at its start."""
    kind = _compression(raw.read(4))
    raw.seek(0)
    return pa.CompressedInputStream(raw, kind) if kind else raw


def _rows(path: Path) -> Iterator[Record]:
    """Yield the rows of a Parquet file as JSON. Nulls that Arrow filled in are taken out later, by the schema of each tool."""
    try:
        table = pq.ParquetFile(path)
        number, size = 0, path.stat().st_size // max(1, table.metadata.num_rows)
        for batch in table.iter_batches(_BATCH):
            for row in batch.to_pylist():
                number += 1
                raw = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                yield Record(f"row {number}", raw, size)
    except pa.ArrowException as error:
        raise DataError(f"'{path}' is a Parquet file that cannot be read: {error}") from error


def documents(path: Path) -> Iterator[Record]:
    """Yield the records of one file; the whole file if it is one JSON document of several lines."""
    found = _of_file(path)
    first = next(found, None)
    if first is None:
        return
    if first.place == "line 1" and path.stat().st_size < _WHOLE and not _is_json(first.raw):
        with path.open("rb") as raw, _decompressed(raw) as stream:
            whole = stream.read()
        if _is_json(whole):
            yield Record(path.name, whole, path.stat().st_size)
            return
    yield first
    yield from found


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def parse(raw: bytes) -> Any:
    """Return the value of a record's JSON.

    Raise `Rejected` for invalid UTF-8, invalid JSON, non-finite numbers, duplicate keys, nesting deeper than `_MAX_DEPTH`,
    and strings with a NUL character or a lone surrogate.
    """
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise Rejected(Code.utf8, f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Rejected(Code.json, f"not JSON: {error.msg} (character {error.pos + 1} of {len(error.doc)})") from error
    except ValueError as error:  # an integer with thousands of digits
        raise Rejected(Code.json, f"not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise Rejected(Code.json, _TOO_DEEP) from error
    _check(value)
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if "\0" in item:
                    raise Rejected(Code.text, "a text holds a NUL character")
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise Rejected(Code.text, f"a text holds the lone surrogate {item[error.start]!r}") from error
            elif isinstance(item, dict):
                deeper += [*item, *item.values()]
            elif isinstance(item, list):
                deeper += item
        level = deeper
    if level:
        raise Rejected(Code.json, _TOO_DEEP)


def _lines(file: io.BufferedReader) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if line.removeprefix(b"\xef\xbb\xbf").strip():
            yield Record(f"line {number}", line, len(line))


def _array(binary: io.BufferedReader, path: Path) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        text, number, read_size = "", 0, _CHUNK

        def read_more() -> bool:
            nonlocal text
            try:
                read = file.read(read_size)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: record {number + 1}: not UTF-8: {error.reason}") from error
            text += read
            return bool(read)

        def expect(allowed: str) -> str:
            nonlocal text
            while not (text := text.lstrip(_WHITESPACE)):
                if not read_more():
                    raise DataError(f"{path}: the array ends after record {number} without its ']'")
            if text[0] not in allowed:
                raise DataError(f"{path}: after record {number}: {text[0]!r} where one of {allowed!r} belongs")
            return text[0]

        expect("[")
        text = text[1:]
        while True:
            # A comma separates elements; none follows the last.
            if number:
                if expect(",]") == "]":
                    break
                text = text[1:]
            while not (text := text.lstrip(_WHITESPACE)) and read_more():
                pass
            if text.startswith("]") and not number:
                break
            while True:
                try:
                    _, end = decoder.raw_decode(text)
                    # A number may continue in the part not read yet.
                    if text[end : end + 1] in (",", "]", *_WHITESPACE) or not read_more():
                        break
                except json.JSONDecodeError as error:
                    read_size = max(_CHUNK, len(text))
                    if not read_more():
                        raise DataError(f"{path}: record {number + 1}: not JSON: {error.msg}") from error
                except (ValueError, RecursionError) as error:  # thousands of digits or brackets
                    raise DataError(f"{path}: record {number + 1}: cannot be read: {error}") from error
            number, read_size = number + 1, _CHUNK
            raw = text[:end].encode("utf-8", "surrogatepass")
            yield Record(f"record {number}", raw, len(raw))
            text = text[end:]
        rest = text[1:]
        while not rest.strip() and (rest := file.read(_CHUNK)):
            pass
        if rest.strip():
            raise DataError(f"{path}: text after the array's ']': {rest.strip()[:40]!r}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        raise Rejected(Code.json, f"the key '{twice}' is given twice in one object")
    return value


def _constant(name: str) -> Any:
    raise Rejected(Code.json, f"{name} is not JSON")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise Rejected(Code.json, f"{text} is too large for a number")
    return value
