"""Source `limi`: trajectories in the schema of GAIR/LIMI, as JSON Lines or one JSON array.

| LIMI | trajectory |
|---|---|
| no id | the first 16 hex digits of the SHA-256 of the record's canonical JSON |
| messages, tools | as they are; a null `tool_calls` or `content` is left out or empty, as named in `repairs` |
| `arguments`, an object | the object, without null-filled keys that the tool's schema does not declare |
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.trajectory import Trajectory, validate
from recipes.errors import DataError


def read(path: Path) -> Iterator[Trajectory]:
    """Yields the file's trajectories in order. Raises `DataError` with the line or record number of the first bad one."""
    for place, record in _records(path):
        if not isinstance(record, dict):
            raise DataError(f"{place}: a record is an object with messages and tools, this is {type(record).__name__}")
        yield to_trajectory(record, place)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            if _first_character(path) == "[":
                try:
                    records = json.load(file)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from error
                yield from ((f"{path}: record {number}", record) for number, record in enumerate(records, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}: line {number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{path}: line {number}: not JSON: {error.msg} at column {error.colno}"
                        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"no file '{path}'; write data.path=FILE (JSON Lines or a JSON array of trajectories)"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: not UTF-8") from error


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(4096).lstrip()[:1]


def to_trajectory(record: dict[str, Any], place: str) -> Trajectory:
    """One LIMI record as a validated trajectory, null-filling undone."""
    repairs: list[str] = []
    declared = {
        t.get("function", {}).get("name"): set(t.get("function", {}).get("parameters", {}).get("properties", {}))
        for t in record.get("tools") or []
        if isinstance(t, dict)
    }
    messages = [_message(m, declared, repairs) for m in record.get("messages") or [] if isinstance(m, dict)]
    canonical = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    identity = record.get("id") or hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return validate(
        {"id": identity, "messages": messages, "tools": record.get("tools") or [], "repairs": repairs}, place
    )


def _message(message: dict[str, Any], declared: dict[str, set[str]], repairs: list[str]) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if value is not None}
    if "content" not in out:
        out["content"] = ""
        repairs.append("null content read as empty")
    if not out.get("tool_calls", True):
        del out["tool_calls"]
        repairs.append("empty tool_calls left out")
    for call in out.get("tool_calls", []):
        function = call.get("function", {})
        arguments, known = function.get("arguments"), declared.get(function.get("name"), set())
        if isinstance(arguments, dict):
            filled = [k for k, v in arguments.items() if v is None and k not in known]
            function["arguments"] = {k: v for k, v in arguments.items() if k not in filled}
            repairs.extend(f"null argument '{k}' of {function.get('name')} removed" for k in filled)
    return out
