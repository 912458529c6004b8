"""Source `limi`: GAIR/LIMI as published, and other data in its schema, as JSON Lines or one JSON array.

| LIMI | trajectory |
|---|---|
| `id`, if present | `id` |
| `messages`, `tools` | unchanged, but null message fields are omitted and null content becomes empty |
| `arguments`, an object | the object without null-filled keys at any depth |
| a tool's schema | without null-filled keywords and properties; a null `default` or `const` remains |

Null-filling: Arrow struct columns unify their keys over all rows, so every call has the keys of all tools. A null counts as
null-filling if the tool's schema does not declare the key, or declares it as optional and of a non-null type. `repairs`
lists each removal.
"""

from typing import Any

from data_prep.records import json_records
from data_prep.trajectory import Code, Rejected

records = json_records


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return a LIMI record as `{id, messages, tools}` without null-filling, and append each repair to `repairs`."""
    unknown = sorted(set(record) - {"id", "messages", "tools"})
    if unknown:
        raise Rejected(
            Code.shape,
            f"unknown field {', '.join(unknown)}; a record has id, messages and tools",
            "remove it from the data",
        )
    tools = [_tool(t, repairs) for t in _list(record, "tools")]
    schemas = dict(map(_schema, tools))
    return {
        "id": record.get("id"),
        "messages": [_message(m, schemas, repairs) for m in _list(record, "messages")],
        "tools": tools,
    }


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = [] if record.get(name) is None else record[name]
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise Rejected(Code.shape, f"{name} must be a list of objects, this is {str(value)[:80]}")
    return value


def _schema(tool: dict[str, Any]) -> tuple[str, Any]:
    """Return the tool's name and the schema of its parameters."""
    function = tool.get("function")
    function = function if isinstance(function, dict) else {}
    return str(function.get("name")), function.get("parameters")


def _message(message: dict[str, Any], schemas: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    out = {key: value for key, value in message.items() if value is not None}
    if "content" not in out:
        out["content"] = ""
        repairs.append("null content read as empty")
    if out.get("tool_calls") == []:
        del out["tool_calls"]
    if isinstance(out.get("tool_calls"), list):
        out["tool_calls"] = [_call(call, schemas, repairs) for call in out["tool_calls"]]
    return out


def _call(call: Any, schemas: dict[str, Any], repairs: list[str]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    filled: list[str] = []
    cleaned = _unfilled(function["arguments"], schemas.get(str(function.get("name"))), "", filled)
    repairs.extend(f"null argument '{path}' of {function.get('name')} removed" for path in filled)
    return {**call, "function": {**function, "arguments": cleaned}}


def _unfilled(value: Any, schema: Any, path: str, filled: list[str]) -> Any:
    """Return the value without null-filled keys, at any depth. Append the path of each removed key to `filled`."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_unfilled(v, schema.get("items"), path, filled) for v in value]
    if not isinstance(value, dict):
        return value
    declared = schema.get("properties")
    declared = declared if isinstance(declared, dict) else {}
    required = schema.get("required") or ()
    out = {}
    for key, inner in value.items():
        key_path = f"{path}.{key}".lstrip(".")
        if inner is None and (key not in declared or (key not in required and _never_null(declared[key]))):
            filled.append(key_path)
        else:
            out[key] = _unfilled(inner, declared.get(key), key_path, filled)
    return out


def _never_null(schema: Any) -> bool:
    """Return whether the schema declares a single type that is not null."""
    return isinstance(schema, dict) and isinstance(schema.get("type"), str) and schema["type"] != "null"


def _tool(tool: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    removed: list[str] = []
    cleaned = _without_nulls(tool, "", removed)
    repairs.extend(f"null {path} removed from the tools" for path in removed)
    return cleaned


def _without_nulls(value: Any, path: str, removed: list[str], names: bool = False) -> Any:
    """Return the value without null keys; append their paths to `removed`. names: keys are property names, not keywords."""
    if isinstance(value, list):
        return [_without_nulls(v, path, removed) for v in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for key, inner in value.items():
        key_path = f"{path}.{key}".lstrip(".")
        literal = not names and key in ("default", "const", "enum", "examples")
        if inner is None and not (literal and key in ("default", "const")):
            removed.append(key_path)
        else:
            out[key] = inner if literal else _without_nulls(inner, key_path, removed, key == "properties" and not names)
    return out
