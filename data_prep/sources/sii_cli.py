"""Source `sii_cli`: SII-CLI event logs, one JSON file per session; `data.path` is a file or a folder of `*.json`.

| event log | trajectory |
|---|---|
| `id` | `id` |
| every `full_request.messages` | merged into one conversation |
| an event's `full_response` (or `response`) | the answer to the preceding request, including the last one |
| `system_instruction` | the first system message |
| `tools[].functionDeclarations[]` | `tools`: all tools ever declared, with Gemini's upper-case types in lower case |
| role `user`, part `text` | a user message |
| `functionResponse` | a tool message with the content `response.output`, or `response.error` and `is_error` |
| role `model`, part `text` / `functionCall` | content / tool call of an assistant message, in part order |
| a part with `thought: true` | `reasoning_content` |

No chat template can render text after a call. Such text therefore starts a new assistant message, and the results of the
earlier calls come before it. Any other kind of part rejects the session, and so do requests that do not form one
conversation. Events without a request or an answer are telemetry and are ignored.
"""

import json
from itertools import pairwise
from typing import Any

from data_prep.records import json_documents
from data_prep.trajectory import Code, Rejected

records = json_documents

Content = dict[str, Any]  # {role: user | model, parts: [...]}
_KINDS = {"text", "functionCall", "functionResponse"}
_PART_FLAGS = {"thought", "thoughtSignature"}


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return an event log as `{id, messages, tools}` and append each repair to `repairs`."""
    events = _list(record.get("events"), "events")
    log = _Log(repairs)
    for number, event in enumerate(events):
        data = event.get("data") if isinstance(event, dict) else None
        if isinstance(data, dict):
            if data.get("full_request") is not None:
                log.request(number, data["full_request"])
            answer = data["full_response"] if data.get("full_response") is not None else data.get("response")
            if answer is not None:
                log.answer(number, answer)
    if not log.contents:
        raise Rejected(Code.shape, "no event holds a full_request with messages")
    if log.open_at is not None:
        repairs.append("the log ends without an answer to its last request")
    messages = [{"role": "system", "content": log.system}] if log.system else []
    return {
        "id": record.get("id"),
        "messages": messages + _messages(log.contents, repairs),
        "tools": [*log.tools.values()],
    }


class _Log:
    """The conversation built so far from a log's requests and answers."""

    def __init__(self, repairs: list[str]) -> None:
        self.repairs = repairs
        self.contents: list[Content] = []
        self.system: str | None = None
        self.tools: dict[str, dict[str, Any]] = {}
        self.open_at: int | None = None  # index in `contents` for the answer to the last request

    def request(self, number: int, request: dict[str, Any]) -> None:
        """Add the request of event `number`: its messages, system instruction and tools."""
        messages = _list(request.get("messages"), "messages")
        for content in messages:
            _check(content, number)
        self._merge(messages, number)
        text = _system(request.get("system_instruction"))
        if self.system is not None and text != self.system:
            self.repairs.append(f"event {number}: a different system instruction; the first is used")
        self.system = text if self.system is None else self.system
        for group in _list(request.get("tools") or [], "tools"):
            for declaration in _list(group.get("functionDeclarations") or [], "functionDeclarations"):
                tool = _tool(declaration)
                if self.tools.setdefault(tool["function"]["name"], tool) != tool:
                    name = tool["function"]["name"]
                    self.repairs.append(
                        f"event {number}: tool '{name}' has a second, different declaration; the first is used"
                    )

    def answer(self, number: int, response: Any) -> None:
        """Add the answer of event `number`. Raise `Rejected` if it contradicts the conversation."""
        parts = _parts(response, number, self.repairs)
        if not parts:
            return
        content = {"role": "model", "parts": parts}
        _check(content, number)
        at = self.open_at if self.open_at is not None else len(self.contents) - 1
        known = self.contents[at : at + 1]
        if known and _comparable(known[0]) == _comparable(content):
            self.contents[at] = _fuller(known[0], content)
        elif known or self.open_at is None:
            raise Rejected(Code.diverged, f"event {number}: the conversation does not continue with this answer")
        else:
            self.contents.append(content)
        self.open_at = None

    def _merge(self, messages: list[Content], event: int) -> None:
        """Merge a request's history, which may continue the conversation, repeat it or overlap its end.

        Histories omit thoughts. Of two copies of a message, retain the one with more parts, which has the thoughts.
        """
        known, incoming = [*map(_comparable, self.contents)], [*map(_comparable, messages)]
        for start in range(len(known) + (not known)):
            overlap = min(len(known) - start, len(incoming))
            if known[start : start + overlap] == incoming[:overlap]:
                merged = [_fuller(a, b) for a, b in zip(self.contents[start:], messages, strict=False)]
                self.contents = self.contents[:start] + merged + self.contents[start + overlap :] + messages[overlap:]
                self.open_at = start + len(messages)
                return
        raise Rejected(
            Code.diverged,
            f"event {event}: its request does not continue the conversation before it (was the history compressed?)",
            "split the session there",
        )


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Rejected(Code.shape, f"{name} is {type(value).__name__}, not a list")
    return value


def _system(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    texts = [part.get("text") for part in _list(value.get("parts"), "parts of the system instruction")]
    if not all(isinstance(t, str) for t in texts):
        raise Rejected(Code.part, "a part of the system instruction is not text")
    return "".join(texts)


def _parts(response: Any, event: int, repairs: list[str]) -> list[Any]:
    """Return the parts of the model's answer.

    The answer is a text, a content object, an API response that wraps one, or a list of chunks of these.
    """
    if isinstance(response, list):
        return [part for chunk in response for part in _parts(chunk, event, repairs)]
    if isinstance(response, str):
        return [{"text": response}] if response else []
    candidates = response.get("candidates")
    if candidates is None:
        return _list(response.get("parts") or [], "parts")
    if len(_list(candidates, "candidates")) > 1:
        repairs.append(f"event {event}: {len(candidates)} candidates; the first is used")
    content = candidates[0].get("content") if candidates else None
    return _list((content or {}).get("parts") or [], "parts")


def _check(content: Any, event: int) -> None:
    """Raise `Rejected` for content that the module's table does not cover."""
    role = content.get("role") if isinstance(content, dict) else None
    if role not in ("user", "model"):
        raise Rejected(Code.shape, f"event {event}: role '{role}' is neither user nor model")
    for part in _list(content.get("parts") or [], "parts"):
        kinds = _KINDS & set(part)
        if len(kinds) != 1 or set(part) - kinds - _PART_FLAGS:
            raise Rejected(Code.part, f"event {event}: a part with {sorted(part)} cannot become text")
        (kind,) = kinds
        if kind != "text" and (kind == "functionCall") != (role == "model"):
            raise Rejected(Code.part, f"event {event}: a {kind} in a message of role {role}")
        if not isinstance(part[kind], str if kind == "text" else dict):
            raise Rejected(Code.shape, f"event {event}: {kind} is {type(part[kind]).__name__}")
        if kind == "functionCall" and not isinstance(part[kind].get("args"), dict | None):
            raise Rejected(Code.arguments, f"event {event}: args of '{part[kind].get('name')}' are not an object")


def _comparable(content: Content) -> str:
    parts = [{k: v for k, v in p.items() if k != "thoughtSignature"} for p in content.get("parts") or []]
    return json.dumps([content["role"], [p for p in parts if not p.get("thought")]], sort_keys=True)


def _fuller(a: Content, b: Content) -> Content:
    return a if len(a.get("parts") or []) >= len(b.get("parts") or []) else b


def _tool(declaration: dict[str, Any]) -> dict[str, Any]:
    parameters = declaration.get("parameters") or {"type": "object", "properties": {}}
    function = {
        "name": declaration.get("name", ""),
        "description": declaration.get("description", ""),
        "parameters": _lower_types(parameters),
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


def _messages(contents: list[Content], repairs: list[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    ids = {p["functionCall"].get("id") for c in contents for p in c.get("parts") or [] if "functionCall" in p}
    free = (f"call_{n}" for n in range(1, 10**9) if f"call_{n}" not in ids)
    model_seen = False
    for number, content in enumerate(contents):
        parts = content.get("parts") or []
        if content["role"] == "user":
            if not model_seen and any("functionResponse" in p for p in parts):
                raise Rejected(Code.orphan_result, f"message {number}: a tool result before any call")
            out += [{"role": "user", "content": p["text"]} for p in parts if "text" in p]
            continue
        model_seen = True
        between = [p for c in _until_model(contents[number + 1 :]) for p in c.get("parts") or []]
        if any("text" in a and "functionResponse" in b for a, b in pairwise(between)):
            repairs.append(f"message {number}: a user's text before a tool result was moved after it")
        waiting = [p["functionResponse"] for p in between if "functionResponse" in p]
        if any("text" in a and not a.get("thought") and b.get("thought") for a, b in pairwise(parts)):
            repairs.append(f"message {number}: a thought after text was moved before it")
        turns = _turns(parts)
        if len(turns) > 1:
            repairs.append(f"message {number}: text after a call starts a new turn")
        for turn in turns:
            out += _turn(turn, waiting, free)
        if waiting:
            raise Rejected(
                Code.orphan_result, f"message {number}: a result of '{waiting[0].get('name')}' answers no call"
            )
    return out


def _until_model(contents: list[Content]) -> list[Content]:
    end = next((n for n, content in enumerate(contents) if content["role"] == "model"), len(contents))
    return contents[:end]


def _turns(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of one model content as assistant turns, each with thoughts, text and calls."""
    turns: list[dict[str, Any]] = [{"thoughts": "", "content": "", "calls": []}]
    for part in parts:
        if "functionCall" in part:
            turns[-1]["calls"].append(part["functionCall"])
        elif part["text"]:
            if turns[-1]["calls"]:
                turns.append({"thoughts": "", "content": "", "calls": []})
            turns[-1]["thoughts" if part.get("thought") else "content"] += part["text"]
    return turns


def _turn(turn: dict[str, Any], waiting: list[dict[str, Any]], free: Any) -> list[dict[str, Any]]:
    """Return an assistant message followed by the results of its calls, in the log's order.

    waiting: open results; matched ones are removed from it. They match by id, or by name if either side has no id.
    free: generator of ids for calls without one.
    """
    message: dict[str, Any] = {"role": "assistant", "content": turn["content"]}
    if turn["thoughts"]:
        message["reasoning_content"] = turn["thoughts"]
    matched: list[tuple[int, dict[str, Any]]] = []
    for call in turn["calls"]:
        name, identity = call.get("name", ""), call.get("id") or next(free)
        function = {"name": name, "arguments": call.get("args") or {}}
        message.setdefault("tool_calls", []).append({"id": identity, "type": "function", "function": function})
        matched_indices = {index for index, _ in matched}
        for index, result in enumerate(waiting):
            by_id = call.get("id") and result.get("id")
            if index not in matched_indices and (result["id"] == call["id"] if by_id else result.get("name") == name):
                matched.append((index, {"role": "tool", "tool_call_id": identity, "name": name, **_output(result)}))
                break
    waiting[:] = [r for index, r in enumerate(waiting) if index not in {index for index, _ in matched}]
    return [message, *(result for _, result in sorted(matched, key=lambda pair: pair[0]))]


def _output(result: dict[str, Any]) -> dict[str, Any]:
    response = result.get("response")
    failed = {"is_error": True} if isinstance(response, dict) and response.get("error") is not None else {}
    if isinstance(response, dict) and response and not set(response) - {"output", "error"}:
        return {"content": "\n".join(_text(v) for v in response.values() if v not in (None, "")), **failed}
    return {"content": _text(response), **failed}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
