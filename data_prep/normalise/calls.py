"""Calls and results: their arguments, and the ids that pair them. No template shows an id; it decides the pairing alone."""

from typing import Any

from data_prep.normalise.null_filling import without_null_arguments
from data_prep.records import parse
from data_prep.trajectory import Code, Rejected

_SILENT = frozenset(
    ("index", "cache_control", "provider_specific_fields", "status", "extra_content", "caller", "output")
)


def normal_calls(calls: Any, number: int, schemas: dict[str, Any], repairs: list[str]) -> list[dict[str, Any]]:
    """Return the calls of a message as `{id?, type, function: {name, arguments}}`, arguments an object without null-filling."""
    if not isinstance(calls, list):
        raise Rejected(Code.shape, f"message {number}: tool_calls is {type(calls).__name__}, not a list")
    return [_call(call, number, schemas, repairs) for call in calls]


def _call(call: Any, number: int, schemas: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise Rejected(Code.shape, f"message {number}: a tool call is {{id, type, function: {{name, arguments}}}}")
    out = {k: v for k, v in call.items() if v is not None and k not in _SILENT}
    if silent := sorted(k for k, v in call.items() if k in _SILENT - {"index"} and v not in (None, "", [], {})):
        repairs.append(f"message {number}: {', '.join(silent)} of a call left out, which no template shows")
    function = {k: v for k, v in call["function"].items() if v is not None}
    name = str(function.get("name"))
    function["arguments"] = _arguments(function.get("arguments"), name, number, schemas.get(name), repairs)
    return {**out, "function": function}


def _arguments(arguments: Any, name: str, number: int, schema: Any, repairs: list[str]) -> dict[str, Any]:
    if isinstance(arguments, str) and not arguments.strip():
        if isinstance(schema, dict) and schema.get("required"):
            raise Rejected(
                Code.arguments,
                f"message {number}: arguments of '{name}' are empty, and the tool requires {', '.join(schema['required'])}",
            )
        repairs.append(f"message {number}: empty arguments of {name} read as {{}}")
        return {}
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments.encode("utf-8", "surrogatepass"))
        except Rejected as error:
            raise Rejected(Code.arguments, f"message {number}: arguments of '{name}': {error}") from error
    if not isinstance(arguments, dict):
        kind = "missing" if arguments is None else f"{type(arguments).__name__}, not an object"
        raise Rejected(Code.arguments, f"message {number}: arguments of '{name}' are {kind}")
    removed: list[str] = []
    cleaned = without_null_arguments(arguments, schema, removed)
    repairs.extend(f"null argument '{path}' of {name} removed" for path in removed)
    return cleaned


def paired(messages: list[dict[str, Any]], repairs: list[str]) -> None:
    """Give every call an id of its own and every result the id of its call.

    A missing id is made, and a result without one is paired by its tool's name or by its place, where that is certain. An id that is
    used again after it was answered is renamed. Raise `Rejected` for a result that could answer several calls.
    """
    used: set[str] = set()
    open_calls: dict[str, dict[str, Any]] = {}  # id in the record -> call
    unnamed: list[dict[str, Any]] = []
    made = renamed = 0
    for number, message in enumerate(messages):
        if message.get("role") == "tool":
            made += _answer(message, number, open_calls, unnamed, messages)
            continue
        if calls := message.get("tool_calls"):
            open_calls, unnamed = {}, []
            given = [c["id"] for c in calls if isinstance(c.get("id"), str) and c["id"]]
            for place, call in enumerate(calls):
                identity = call.get("id")
                if identity is None or identity == "":
                    call["id"] = _free(f"call_{number}_{place}", used, given)
                    unnamed.append(call)
                    made += 1
                elif isinstance(identity, str):
                    if identity in open_calls:
                        raise Rejected(Code.duplicate_call, f"message {number}: call id '{identity}' is used twice")
                    if identity in used:
                        call["id"] = _free(f"{identity}.{number}", used, given)
                        renamed += 1
                    open_calls[identity] = call
                used.add(str(call["id"]))
    if made:
        repairs.append(f"{made} missing ids of calls and results made")
    if renamed:
        repairs.append(f"{renamed} call ids renamed, which were used again after they were answered")


def _answer(
    message: dict[str, Any],
    number: int,
    open_calls: dict[str, dict[str, Any]],
    unnamed: list[dict[str, Any]],
    messages: list[dict[str, Any]],
) -> int:
    """Set the id of a result's call. Return 1 if it was made."""
    identity = message.get("tool_call_id")
    given = isinstance(identity, str) and identity
    if given and identity in open_calls:
        message["tool_call_id"] = open_calls.pop(identity)["id"]
        return 0
    if given and not unnamed:
        return 0  # `trajectory.py` refuses it by name
    waiting = [*unnamed] if given else [*open_calls.values(), *unnamed]
    name = message.get("name")
    fitting = [c for c in waiting if name is None or c["function"].get("name") == name]
    following = 0  # results of the same turn, this one included
    for later in messages[number:]:
        if later.get("role") != "tool":
            break
        following += 1
    # Several calls fit: their order is certain only if every open call has its result here.
    if not fitting or (len(fitting) > 1 and following != len(waiting)):
        known = f" of '{name}'" if name else ""
        raise Rejected(
            Code.orphan_result,
            f"message {number}: a tool result{known} without tool_call_id answers no open call that is certain",
            "write tool_call_id",
        )
    call = fitting[0]
    message["tool_call_id"] = call["id"]
    if call in unnamed:
        unnamed.remove(call)
    else:
        del open_calls[next(k for k, c in open_calls.items() if c is call)]
    return 1


def _free(wanted: str, used: set[str], given: list[str]) -> str:
    while wanted in used or wanted in given:
        wanted += "_"
    return wanted


def from_text(value: Any, what: str, repairs: list[str]) -> Any:
    """Return a value, parsed if it is JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        found = parse(value.encode("utf-8", "surrogatepass"))
    except Rejected as error:
        raise Rejected(error.code, f"{what} is text that is not JSON: {error.problem}", error.fix) from error
    repairs.append(f"{what} read from JSON text")
    return found
