"""Read the raw records of a source file one by one: JSON Lines, a JSON array, or one JSON document per file.

Only the current record is in memory, so memory does not grow with the file.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.trajectory import Code, Rejected
from recipes.errors import DataError

_CHUNK = 1 << 20
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
    """Yield every record of a JSON Lines file, or every element of a JSON array, in order.

    Raise `DataError` if an array is malformed: the records after the fault cannot be separated.
    """
    if path.is_dir():
        raise DataError(f"'{path}' is a folder, and this source reads one file", "write data.path=FILE")
    with path.open("rb") as file:
        start = file.read(3).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start and (read := file.read(_CHUNK)):
            start = read.lstrip()
    yield from _array(path) if start.startswith(b"[") else _lines(path)


def json_documents(path: Path) -> Iterator[Record]:
    """Yield the file as one record; for a folder, yield each `*.json` in it as one record, sorted by name."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        raw = file.read_bytes()
        yield Record(file.name, raw, len(raw))


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


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield Record(f"line {number}", line, len(line))


def _array(path: Path) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", newline="") as file:
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
