"""Nulls that nobody wrote. Arrow unifies the keys of a column over all rows, so every call has the keys of all tools, and every schema
the keywords of all schemas, filled with null.

A null of an argument goes only where the tool's schema, read whole, has no place for it.
"""

from collections.abc import Iterator
from typing import Any

_LITERALS = ("default", "const")  # a null in these means something
_MOST = 32  # references followed in a row


def without_nulls(value: Any, path: str, removed: list[str], names: bool = False) -> Any:
    """Return a tool without null keywords and properties; append their paths to `removed`. names: keys are property names."""
    if isinstance(value, list):
        return [without_nulls(v, path, removed) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, inner in value.items():
        key_path = f"{path}.{key}".lstrip(".")
        literal = not names and key in (*_LITERALS, "enum", "examples")
        if inner is None and (names or key not in _LITERALS):
            removed.append(key_path)
        else:
            out[key] = inner if literal else without_nulls(inner, key_path, removed, key == "properties" and not names)
    return out


def without_null_arguments(arguments: dict[str, Any], schema: Any, removed: list[str]) -> dict[str, Any]:
    """Return the arguments of a call without null-filling, at any depth; append the path of each key to `removed`."""
    out: dict[str, Any] = _unfilled(arguments, schema, schema, "", removed)
    return out


def _unfilled(value: Any, schema: Any, root: Any, path: str, removed: list[str]) -> Any:
    branches = [*_branches(schema, root)]
    if isinstance(value, list):
        items = [b.get("items") for b in branches if isinstance(b.get("items"), dict | bool)]
        return [_unfilled(v, {"anyOf": items} if items else True, root, path, removed) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, inner in value.items():
        key_path = f"{path}.{key}".lstrip(".")
        places = [*_places(branches, key, not path)]
        required = any(key in _list(b.get("required")) for b in branches)
        if inner is None and not required and not any(_allows_null(place, root) for place in places):
            removed.append(key_path)
        else:
            out[key] = _unfilled(inner, {"anyOf": places} if places else True, root, key_path, removed)
    return out


def _places(branches: list[dict[str, Any]], key: str, top: bool) -> Iterator[Any]:
    """Yield the schemas that a key has in an object of these schemas: none if the object names its keys and not this one.

    top: the object is a call's arguments. A tool without a schema takes none.
    """
    for b in branches:
        properties = b.get("properties")
        if isinstance(properties, dict) and key in properties:
            yield properties[key]
        elif "additionalProperties" in b:
            yield b["additionalProperties"]
        elif properties is None and (b or not top):
            yield True  # an object of any keys


def _branches(schema: Any, root: Any, followed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a schema's alternatives and parts, with references of the same document followed."""
    if not isinstance(schema, dict) or followed > _MOST:
        yield {}
        return
    reference = schema.get("$ref")
    if isinstance(reference, str):
        yield from _branches(_target(reference, root), root, followed + 1)
    inner = [s for name in ("anyOf", "oneOf", "allOf") for s in _list(schema.get(name))]
    own = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf", "allOf", "$ref")}
    if own.keys() & {"properties", "additionalProperties", "items", "required"} or not (inner or reference):
        yield own
    for one in inner:
        yield from _branches(one, root, followed + 1)


def _allows_null(schema: Any, root: Any, followed: int = 0) -> bool:
    """Return whether the schema has a place for null."""
    if not isinstance(schema, dict) or followed > _MOST:
        return schema is True
    kind = schema.get("type")
    if isinstance(reference := schema.get("$ref"), str):
        found = _allows_null(_target(reference, root), root, followed + 1)
    elif schema.get("nullable") is True:
        found = True
    elif "const" in schema:
        found = schema["const"] is None
    elif isinstance(schema.get("enum"), list):
        found = None in schema["enum"]
    elif kind is not None:
        found = "null" in (kind if isinstance(kind, list) else [kind])
    elif either := _list(schema.get("anyOf")) + _list(schema.get("oneOf")):
        found = any(_allows_null(one, root, followed + 1) for one in either)
    elif every := _list(schema.get("allOf")):
        found = all(_allows_null(one, root, followed + 1) for one in every)
    else:
        found = not schema.keys() & {"properties", "items"}
    return found


def _target(reference: str, root: Any) -> Any:
    """Return what a reference into the same document names; an empty schema for any other."""
    if not reference.startswith("#"):
        return {}
    found = root
    for step in reference[1:].strip("/").split("/"):
        if step:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step, {}) if isinstance(found, dict) else {}
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
