"""The sources of trajectories, one module each. A module has

`records(path) -> Iterator[Record]`: the records of a file or folder, not parsed.

`convert(record, repairs) -> dict`: a parsed record as `{id?, messages, tools}`; what had to be fixed is appended to
`repairs`. A record that it cannot map raises `Rejected`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from data_prep.records import Record, parse
from data_prep.trajectory import Code, Rejected, Trajectory, validate
from recipes.compose.names.nearest import nearest
from recipes.errors import ConfigError


class Source(Protocol):
    records: Callable[[Path], Iterator[Record]]
    convert: Callable[[dict[str, Any], list[str]], dict[str, Any]]


def source(name: str) -> Source:
    """The module of that name. Raises `ConfigError` with those there are."""
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if name not in known:
        near = nearest(name, known)
        raise ConfigError(
            f"unknown data.source '{name}' (known: {', '.join(known)})",
            f"write data.source={near}" if near else "write data.source=NAME, one of them",
        )
    return cast(Source, importlib.import_module(f"{__name__}.{name}"))


def trajectory(record: Record, of: Source) -> Trajectory:
    """One record as a validated trajectory; its id as given, or made of the content's hash. Raises `Rejected`."""
    value = parse(record.raw)
    if not isinstance(value, dict):
        raise Rejected(Code.shape, f"a record is a JSON object, this is {type(value).__name__}")
    repairs: list[str] = []
    given = value.get("id") if isinstance(value.get("id"), str) else None
    try:
        converted = of.convert(value, repairs)
        identity = converted.pop("id", None)
        made = validate({**converted, "id": "to be made" if identity is None else identity, "repairs": repairs})
    except Rejected as error:
        raise Rejected(error.code, error.problem, error.fix, given) from error
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise Rejected(Code.shape, f"it does not have the shape of this source: {error}", identity=given) from error
    return made if identity is not None else made.model_copy(update={"id": made.content_hash()[:16]})


def read(path: Path, name: str) -> Iterator[Trajectory]:
    """Every trajectory of a source, in order. Raises `Rejected` with the first that is none."""
    module = source(name)
    for record in module.records(path):
        try:
            yield trajectory(record, module)
        except Rejected as error:
            raise Rejected(error.code, f"{path}: {record.place}: {error.problem}", error.fix) from error
