"""Reading of JSON files that may be damaged or edited. An error names the file, the line and what is expected there."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from recipes.errors import CheckpointError, LimiError

_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}


def read_json(path: Path, fix: str, error: type[LimiError] = CheckpointError) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raise `error` with this fix if the file does not hold one. A missing file raises `OSError`.
    """
    value = _parsed(_text(path, path.read_bytes(), fix, error), str(path), 1, fix, error)
    if not isinstance(value, dict):
        raise error(f"'{path}' holds {kind(value)}, and an object belongs there", fix)
    return value


def lines(path: Path, fix: str, error: type[LimiError] = CheckpointError) -> list[dict[str, Any]]:
    """Return the JSON objects in a file with one object per line. Raise errors as `read` does.

    Skip blank lines, and a last line without a line break, which is still being written.
    """
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    found = []
    for number, line in enumerate(_text(path, whole, fix, error).split("\n") if whole.strip() else [], 1):
        if not line.strip():
            continue
        value = _parsed(line, str(path), number, fix, error)
        if not isinstance(value, dict):
            raise error(f"'{path}', line {number} holds {kind(value)}, and an object belongs there", fix)
        found.append(value)
    return found


@contextlib.contextmanager
def shape(path: Path, fix: str, error: type[LimiError] = CheckpointError) -> Iterator[None]:
    """Run a block that takes apart an object of `read`. Raise `error` if fields are missing or values have another type."""
    try:
        yield
    except KeyError as missing:
        raise error(f"'{path}' has no {missing.args[0]}", fix) from missing
    except (TypeError, AttributeError, IndexError, ValueError) as wrong:
        raise error(f"'{path}' holds other values than belong there ({wrong})", fix) from wrong


def kind(value: Any) -> str:
    """Return the type of a JSON value in words."""
    return "null" if value is None else _KINDS[type(value)]


def _text(path: Path, raw: bytes, fix: str, error: type[LimiError]) -> str:
    """Return the bytes decoded as UTF-8. Raise `error` if they are not text."""

    def refuse(what: str) -> NoReturn:
        raise error(f"'{path}' {what}, and JSON in UTF-8 belongs there", fix)

    if not raw.strip():
        refuse("is empty")
    if raw.startswith(b"version https://git-lfs"):
        refuse("is a pointer of Git LFS (`git lfs pull` brings the file)")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        refuse("is UTF-16")
    if raw.startswith(b"\xef\xbb\xbf"):
        refuse("begins with a byte order mark, which other readers refuse")
    try:
        return raw.decode()
    except UnicodeDecodeError as wrong:
        line = raw.count(b"\n", 0, wrong.start) + 1
        refuse(f"is not UTF-8 in line {line}")


def _parsed(text: str, path: str, line: int, fix: str, error: type[LimiError]) -> Any:
    """Return the parsed text. Raise `error` if it is not JSON. line: number of the text's first line in the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as wrong:
        at = line + wrong.lineno - 1
        if not text[wrong.pos :].strip() or wrong.msg.startswith("Unterminated"):
            raise error(f"'{path}' is cut off in line {at}", fix) from wrong
        raise error(f"'{path}', line {at}, column {wrong.colno}: {wrong.msg}", fix) from wrong
    except (ValueError, RecursionError) as wrong:  # thousands of digits, or of brackets
        raise error(f"'{path}', from line {line}: {wrong}", fix) from wrong
