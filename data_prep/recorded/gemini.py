"""The dialect `gemini`: contents of parts, as Gemini's API and SII-CLI's event logs have them.

| in the log | in chat form |
|---|---|
| `system_instruction` | the first system message |
| `tools[].functionDeclarations[]` | tools, with upper-case types in lower case |
| role `user`, part `text` | a user message each |
| `functionResponse` | a tool message with the content `response.output`, or `response.error` and `is_error` |
| role `model`, parts `text` and `functionCall` | an assistant message; its thoughts are parts with `thought: true` |

No chat template can render text after a call. Such text is a message of its own, after the results of the earlier calls. As no model
said it there, it is not learned.
"""

import json
from itertools import pairwise
from typing import Any

from data_prep.recorded.forms import Answer, Request, listed, unfinished
from data_prep.trajectory import Code, Rejected

Content = dict[str, Any]  # {role: user | model, parts: [...]}
_KINDS = {"text", "functionCall", "functionResponse"}
_PART_FLAGS = {"thought", "thoughtSignature"}
_WHOLE = ("", "STOP")


def request(body: dict[str, Any], notes: list[str]) -> Request:
    """Return what a request says."""
    if isinstance(config := body.get("config"), dict):  # the form of Gemini's own SDK
        body = {**body, **config}
    contents = listed(body.get("messages") if body.get("messages") is not None else body.get("contents"), "messages")
    system = _system(body.get("system_instruction") or body.get("systemInstruction"))
    groups = [g for g in listed(body.get("tools") or [], "tools") if g.get("functionDeclarations")]
    tools = [_tool(d) for g in groups for d in listed(g["functionDeclarations"], "functionDeclarations")]
    messages = [{"role": "system", "content": system}] if system else []
    return Request(messages + _messages(contents, notes), tools)


def answer(body: Any, notes: list[str]) -> Answer:
    """Return the answer of a response: a text, a content, an API response that wraps one, or a list of chunks of these."""
    parts = _parts(body, notes)
    if not parts:
        return Answer(None)
    _check({"role": "model", "parts": parts})
    first, *rest = _turns(parts, notes)
    if rest:
        notes.append("what its answer has after a call is not learned")
    return Answer(first, unfinished({"finishReason": _finish(body)}, "finishReason", _WHOLE))


def _finish(body: Any) -> str:
    if isinstance(body, list):
        return next((found for chunk in reversed(body) if (found := _finish(chunk))), "")
    candidates = body.get("candidates") if isinstance(body, dict) else None
    return str(candidates[0].get("finishReason") or "") if candidates else ""


def _system(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    texts = [part.get("text") for part in listed(value.get("parts"), "parts of the system instruction")]
    if not all(isinstance(t, str) for t in texts):
        raise Rejected(Code.part, "a part of the system instruction is not text")
    return "".join(texts)


def _parts(body: Any, notes: list[str]) -> list[Any]:
    if isinstance(body, list):
        return [part for chunk in body for part in _parts(chunk, notes)]
    if isinstance(body, str):
        return [{"text": body}] if body else []
    candidates = body.get("candidates")
    if candidates is None:
        return listed(body.get("parts") or [], "parts")
    if len(listed(candidates, "candidates")) > 1:
        notes.append(f"has {len(candidates)} candidates; the first is used")
    content = candidates[0].get("content") if candidates else None
    return listed((content or {}).get("parts") or [], "parts")


def _messages(contents: list[Content], notes: list[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    heard: list[dict[str, Any]] = []  # parts of users since the last turn: results come first, as chat messages want it
    turns: list[dict[str, Any]] = []
    for content in contents:
        _check(content)
        parts = content.get("parts") or []
        if content["role"] == "user":
            heard += parts
            continue
        out += _answered(turns, heard, notes)
        heard, turns = [], _turns(parts, notes)
    return out + _answered(turns, heard, notes)


def _answered(turns: list[dict[str, Any]], parts: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Return the turns of one model content, each with the results of its calls, and then what the user said."""
    if any("text" in a and "functionResponse" in b for a, b in pairwise(parts)):
        notes.append("a user's text before a tool result was moved after it")
    results = [_result(p["functionResponse"]) for p in parts if "functionResponse" in p]
    out: list[dict[str, Any]] = []
    for turn in turns[:-1]:
        asked = {name for call in turn.get("tool_calls", []) for name in (call["id"] or call["function"]["name"],)}
        mine = [r for r in results if (r["tool_call_id"] or r["name"]) in asked]
        results = [r for r in results if r not in mine]
        out += [turn, *mine]
    return [*out, *turns[-1:], *results, *({"role": "user", "content": p["text"]} for p in parts if "text" in p)]


def _turns(parts: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Return the parts of one model content as assistant messages: a new one begins with text after a call."""
    groups: list[list[dict[str, Any]]] = [[]]
    for part in parts:
        if part.get("text") and any("functionCall" in p for p in groups[-1]):
            groups.append([])
        groups[-1].append(part)
    if len(groups) > 1:
        notes.append("text after a call starts a new turn")
    return [_turn(group, notes) for group in groups]


def _turn(parts: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    if any(a.get("text") and not a.get("thought") and b.get("thought") for a, b in pairwise(parts)):
        notes.append("a thought after text was moved before it")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(p["text"] for p in parts if "text" in p and not p.get("thought")),
    }
    if thoughts := "".join(p["text"] for p in parts if p.get("thought") and "text" in p):
        message["reasoning_content"] = thoughts
    if calls := [_call(p["functionCall"]) for p in parts if "functionCall" in p]:
        message["tool_calls"] = calls
    return message


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call.get("name", ""), "arguments": call.get("args") or {}}
    return {"id": call.get("id"), "type": "function", "function": function}


def _result(result: dict[str, Any]) -> dict[str, Any]:
    response = result.get("response")
    failed = {"is_error": True} if isinstance(response, dict) and response.get("error") is not None else {}
    if isinstance(response, dict) and response and not set(response) - {"output", "error"}:
        text = "\n".join(_text(v) for v in response.values() if v not in (None, ""))
    else:
        text = _text(response)
    return {"role": "tool", "tool_call_id": result.get("id"), "name": result.get("name"), "content": text, **failed}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check(content: Any) -> None:
    """Raise `Rejected` for content that the module's table does not cover."""
    role = content.get("role") if isinstance(content, dict) else None
    if role not in ("user", "model"):
        raise Rejected(Code.shape, f"role '{role}' is neither user nor model")
    for part in listed(content.get("parts") or [], "parts"):
        kinds = _KINDS & set(part)
        if len(kinds) != 1 or set(part) - kinds - _PART_FLAGS:
            raise Rejected(Code.part, f"a part with {sorted(part)} cannot become text")
        (kind,) = kinds
        if kind != "text" and (kind == "functionCall") != (role == "model"):
            raise Rejected(Code.part, f"a {kind} in a message of role {role}")
        if not isinstance(part[kind], str if kind == "text" else dict):
            raise Rejected(Code.shape, f"{kind} is {type(part[kind]).__name__}")
        if kind == "functionCall" and not isinstance(part[kind].get("args"), dict | None):
            raise Rejected(Code.arguments, f"args of '{part[kind].get('name')}' are not an object")


def _tool(declaration: dict[str, Any]) -> dict[str, Any]:
    parameters = declaration.get("parameters") or declaration.get("parametersJsonSchema")
    function = {
        "name": declaration.get("name", ""),
        "description": declaration.get("description", ""),
        "parameters": _lower_types(parameters or {"type": "object", "properties": {}}),
    }
    return {"type": "function", "function": function}


def _lower_types(schema: Any) -> Any:
    """Return the schema with types in lower case. Change schemas only: a default can be an object with a `type` key."""
    if isinstance(schema, list):
        return [_lower_types(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    kind = schema.get("type")
    if isinstance(kind, str | list):
        out["type"] = kind.lower() if isinstance(kind, str) else [k.lower() if isinstance(k, str) else k for k in kind]
    for key in {"items", "prefixItems", "anyOf", "allOf", "oneOf", "not", "additionalProperties"} & set(schema):
        out[key] = _lower_types(schema[key])
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {name: _lower_types(s) for name, s in schema["properties"].items()}
    return out
