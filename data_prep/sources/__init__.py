"""The sources of trajectories, one module each. Every module defines two functions.

`records(path) -> Iterator[Record]` yields the unparsed records of a file or folder.

`convert(record, repairs) -> dict` maps the names of a parsed record to `{id?, messages, tools, …}`, and appends what it repaired to
`repairs`. It raises `Rejected` for a record that it cannot map. `data_prep/normalise/` then mends every source's record alike.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from data_prep.normalise.record import normalise
from data_prep.reading import Reading
from data_prep.records import Record, parse
from data_prep.trajectory import Code, Rejected, Trajectory, validate
from recipes.compose.names.nearest import nearest
from recipes.config import Columns, OpenCalls
from recipes.errors import ConfigError

_PLAIN = Reading()


class Source(Protocol):
    """The interface of a source module."""

    records: Callable[[Path], Iterator[Record]]
    convert: Callable[[dict[str, Any], list[str]], dict[str, Any]]


def source(name: str) -> Source:
    """Return the source module of that name. Raise `ConfigError` with the known names if there is none."""
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if name not in known:
        near = nearest(name, known)
        raise ConfigError(
            f"unknown data.source '{name}' (known: {', '.join(known)})",
            f"write data.source={near}" if near else "write data.source=NAME, one of them",
        )
    return cast(Source, importlib.import_module(f"{__name__}.{name}"))


def read_trajectory(record: Record, source_module: Source, reading: Reading = _PLAIN) -> Trajectory:
    """Return one record as a validated trajectory. Its id is the given one, or 16 digits of the content hash.

    Raise `Rejected` if the record is invalid.
    """
    value = parse(record.raw)
    if not isinstance(value, dict):
        raise Rejected(Code.shape, f"a record is a JSON object, this is {type(value).__name__}")
    repairs: list[str] = []
    own = value.get("id") if isinstance(value.get("id"), str) else None
    try:
        mapped = source_module.convert(_renamed(value, reading.columns), repairs)
        converted = normalise(reading.given.completed(mapped, repairs), reading.joins, repairs, reading.broken_calls)
        converted["open_calls"] = reading.open_calls is OpenCalls.keep
        identity = converted.pop("id", None)
        validated = validate({**converted, "id": "to be made" if identity is None else identity, "repairs": repairs})
    except Rejected as error:
        raise Rejected(error.code, error.problem, error.fix, own) from error
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise Rejected(Code.shape, f"it does not have the shape of this source: {error}", identity=own) from error
    return validated if identity is not None else validated.model_copy(update={"id": validated.content_hash()[:16]})


def _renamed(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Return the record with its columns of messages and tools under these names."""
    out = dict(record)
    for own, name in (("messages", columns.messages), ("tools", columns.tools)):
        if name != own and name in out:
            if out.get(own) not in (None, "", [], {}):
                raise Rejected(
                    Code.shape, f"a record has both {own} and {name}", f"leave out data.columns.{own}={name}"
                )
            out[own] = out.pop(name)
    return out


def read_trajectories(path: Path, name: str) -> Iterator[Trajectory]:
    """Yield every trajectory of a source, in order. Raise `Rejected` for the first invalid record."""
    module = source(name)
    for record in module.records(path):
        try:
            yield read_trajectory(record, module)
        except Rejected as error:
            raise Rejected(error.code, f"{path}: {record.place}: {error.problem}", error.fix) from error
