"""Validators of tools' parameters. A schema is judged by its own `$schema`, or as draft 2020-12. Dialects are lowered in a copy: the
template shows the tool as it is. A schema that is none even so judges nothing, and is counted."""

import json
from functools import lru_cache
from typing import Any

from jsonschema import Draft7Validator, Draft202012Validator, SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

_TYPES = {
    "dict": "object", "map": "object", "struct": "object", "str": "string", "text": "string", "int": "integer", "long": "integer",
    "float": "number", "double": "number", "bool": "boolean", "list": "array", "tuple": "array", "none": "null",
}  # fmt: skip
_FREE = ("any", "mixed")  # types that allow every value
_VALID = ("object", "string", "integer", "number", "boolean", "array", "null")
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")


@lru_cache(64)
def validators(functions: str) -> dict[str, Validator | None]:
    """Return the validator of every function by its name; None for one whose schema judges nothing.

    functions: a list of {name, parameters} as JSON, which is the cache key; most records share it.
    """
    return {f["name"]: _validator(f.get("parameters") or {}) for f in json.loads(functions)}


def _validator(schema: Any) -> Validator | None:
    try:
        schema = lowered(schema)
        kind = validator_for(schema, default=Draft7Validator if _has_tuples(schema) else Draft202012Validator)
        kind.check_schema(schema)
    except (SchemaError, RecursionError):
        return None
    # An empty registry: a schema with a remote reference must not trigger a download.
    return kind(schema, registry=Registry())


def lowered(schema: Any) -> Any:
    """Return a copy of a schema without dialects: names of types of programming languages, `required: true` at a property,
    `nullable`."""
    if isinstance(schema, list):
        return [lowered(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            out[key] = {name: lowered(one) for name, one in value.items()}
        elif key in ("default", "const", "enum", "examples"):
            out[key] = value
        elif key == "type":
            kinds = [_kind(k) for k in (value if isinstance(value, list) else [value])]
            if not any(k in _FREE for k in kinds):
                out[key] = kinds if isinstance(value, list) else kinds[0]
        elif key == "required" and isinstance(value, bool):
            continue
        else:
            out[key] = lowered(value)
    if schema.get("nullable") is True and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
        out.pop("nullable", None)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        flagged = [name for name, one in properties.items() if isinstance(one, dict) and one.get("required") is True]
        if flagged:
            known = out.get("required")
            out["required"] = [*(known if isinstance(known, list) else []), *flagged]
    return out


def _kind(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    lower = name.lower()
    return _TYPES.get(lower, lower if lower in (*_VALID, *_FREE) else name)


def _has_tuples(schema: Any) -> bool:
    """Return whether the schema lists the items of a tuple, as drafts before 2020 do."""
    if isinstance(schema, list):
        return any(map(_has_tuples, schema))
    if not isinstance(schema, dict):
        return False
    return isinstance(schema.get("items"), list) or any(map(_has_tuples, schema.values()))
