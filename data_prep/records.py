"""The records of a source file as they lie there, one by one: JSON Lines, a JSON array, or one JSON document a file.

Nothing is held but the record at hand, so that memory does not grow with the file.
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
_SPACE = " \t\n\r"
_DEEPEST = 64
_TOO_DEEP = f"nested deeper than {_DEEPEST} levels"


@dataclass(frozen=True)
class Record:
    """place: file and line or number, for messages. raw: its JSON, not yet parsed. size: bytes read for it."""

    place: str
    raw: bytes
    size: int


def json_records(path: Path) -> Iterator[Record]:
    """Every record of JSON Lines, or every element of a JSON array, in order.

    Raises `DataError` where an array breaks off: what comes after it cannot be told apart.
    """
    if path.is_dir():
        raise DataError(f"'{path}' is a folder, and this source reads one file", "write data.path=FILE")
    with path.open("rb") as file:
        start = file.read(3).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start and (read := file.read(_CHUNK)):
            start = read.lstrip()
    yield from _array(path) if start.startswith(b"[") else _lines(path)


def json_documents(path: Path) -> Iterator[Record]:
    """The file, or every `*.json` in the folder by name, as one record each."""
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        raw = file.read_bytes()
        yield Record(file.name, raw, len(raw))


def parse(raw: bytes) -> Any:
    """The value of a record's JSON. Raises `Rejected` for wrong bytes, wrong JSON, numbers that are not finite, a key given
    twice, nesting deeper than `_DEEPEST`, and texts with a NUL or half a surrogate pair."""
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except UnicodeDecodeError as error:
        raise Rejected(Code.utf8, f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Rejected(Code.json, f"not JSON: {error.msg} (character {error.pos + 1} of {len(error.doc)})") from error
    except ValueError as error:  # an integer of thousands of digits
        raise Rejected(Code.json, f"not JSON that can be read: {error}") from error
    except RecursionError as error:
        raise Rejected(Code.json, _TOO_DEEP) from error
    _check(value)
    return value


def _check(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for v in level:
            if isinstance(v, str):
                if "\0" in v:
                    raise Rejected(Code.text, "a text holds a NUL character")
                try:
                    v.encode()
                except UnicodeEncodeError as error:
                    raise Rejected(Code.text, f"a text holds the lone surrogate {v[error.start]!r}") from error
            elif isinstance(v, dict):
                deeper += [*v, *v.values()]
            elif isinstance(v, list):
                deeper += v
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
        text, number, wanted = "", 0, _CHUNK

        def more() -> bool:
            nonlocal text
            try:
                read = file.read(wanted)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: record {number + 1}: not UTF-8: {error.reason}") from error
            text += read
            return bool(read)

        def expect(allowed: str) -> str:
            nonlocal text
            while not (text := text.lstrip(_SPACE)):
                if not more():
                    raise DataError(f"{path}: the array ends after record {number} without its ']'")
            if text[0] not in allowed:
                raise DataError(f"{path}: after record {number}: {text[0]!r} where one of {allowed!r} belongs")
            return text[0]

        expect("[")
        text = text[1:]
        while True:
            # Between elements a comma, and none after the last.
            if number:
                if expect(",]") == "]":
                    break
                text = text[1:]
            while not (text := text.lstrip(_SPACE)) and more():
                pass
            if text.startswith("]") and not number:
                break
            while True:
                try:
                    _, end = decoder.raw_decode(text)
                    # A number may go on in what has not been read yet.
                    if text[end : end + 1] in (",", "]", *_SPACE) or not more():
                        break
                except json.JSONDecodeError as error:
                    wanted = max(_CHUNK, len(text))
                    if not more():
                        raise DataError(f"{path}: record {number + 1}: not JSON: {error.msg}") from error
                except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
                    raise DataError(f"{path}: record {number + 1}: cannot be read: {error}") from error
            number, wanted = number + 1, _CHUNK
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
