"""Source `sii_cli`: SII-CLI event logs, one JSON a session; `data.path` is a file or a folder of `*.json`.

| event log | trajectory |
|---|---|
| `id` | `id` |
| every `full_request.messages` | merged into the one conversation that they continue |
| `full_response` (or `response`) of an event | the model's answer, the last one included |
| `system_instruction` | the first system message |
| `tools[].functionDeclarations[]` | `tools`, all that were ever declared; Gemini's upper-case types in lower case |
| role `user`, part `text` | a user message |
| `functionResponse` | a tool message: `response.output`; `response.error` as the content with `is_error` |
| role `model`, part `text` / `functionCall` | content / tool call of an assistant message, in the order of the parts |
| a part with `thought: true` | `reasoning_content` |

A text after a call starts a new assistant message, each call followed by its own result: no chat template can show text
behind a call. Any other kind of part rejects the session. Events without a request or an answer are telemetry.
"""

import json
from itertools import pairwise
from typing import Any

from data_prep.records import json_documents
from data_prep.trajectory import Code, Rejected

records = json_documents

Content = dict[str, Any]  # {role: user | model, parts: [...]}


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    events = record.get("events")
    if not isinstance(events, list):
        raise Rejected(Code.shape, "an event log has a list of events")
    said: list[Content] = []
    system: str | None = None
    tools: dict[str, dict[str, Any]] = {}
    answered = True
    for number, event in enumerate(events):
        data = event.get("data") if isinstance(event, dict) else None
        if not isinstance(data, dict):
            continue
        request = data.get("full_request")
        if isinstance(request, dict):
            said, answered = _merged(said, request.get("messages") or [], number), False
            text = _system(request.get("system_instruction"))
            if system is not None and text != system:
                repairs.append(f"event {number}: another system instruction; the first is kept")
            system = text if system is None else system
            _declare(request.get("tools") or [], tools, number, repairs)
        answer = _answer(data.get("full_response", data.get("response")))
        if answer is not None:
            said, answered = [*said, answer], True
    if not said:
        raise Rejected(Code.shape, "no event holds a full_request")
    if not answered:
        repairs.append("the log ends without an answer to its last request")
    messages = [{"role": "system", "content": system}] if system else []
    return {"id": record.get("id"), "messages": messages + _messages(said, repairs), "tools": [*tools.values()]}


def _system(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(part.get("text", "") for part in value.get("parts") or [])
    return value or ""


def _answer(value: Any) -> Content | None:
    """The model's content in a response, whole or as the API wraps it."""
    if not isinstance(value, dict):
        return None
    if value.get("candidates"):
        value = value["candidates"][0].get("content") or {}
    return {"role": "model", "parts": value["parts"]} if value.get("parts") else None


def _merged(said: list[Content], messages: list[Content], event: int) -> list[Content]:
    """The conversation so far with this request's history, which continues it, repeats it or overlaps its end.

    Histories leave thoughts out; where both have a message, the one with its thoughts is kept.
    """
    mine, theirs = [*map(_comparable, said)], [*map(_comparable, messages)]
    for start in range(len(said) + 1):
        overlap = min(len(said) - start, len(messages))
        if (overlap or not said) and mine[start : start + overlap] == theirs[:overlap]:
            kept = [_fuller(a, b) for a, b in zip(said[start:], messages, strict=False)]
            return said[:start] + kept + said[start + overlap :] + messages[overlap:]
    raise Rejected(
        Code.diverged,
        f"event {event}: its request does not continue the conversation before it (was the history compressed?); split the "
        "session there",
    )


def _comparable(content: Content) -> str:
    parts = [{k: v for k, v in p.items() if k not in ("thoughtSignature",)} for p in content.get("parts") or []]
    return json.dumps([content.get("role"), [p for p in parts if not p.get("thought")]], sort_keys=True)


def _fuller(a: Content, b: Content) -> Content:
    return a if len(a.get("parts") or []) >= len(b.get("parts") or []) else b


def _declare(groups: list[Any], tools: dict[str, dict[str, Any]], event: int, repairs: list[str]) -> None:
    for declaration in (d for g in groups for d in g.get("functionDeclarations") or []):
        function = {
            "name": declaration.get("name", ""),
            "description": declaration.get("description", ""),
            "parameters": _lower_types(declaration.get("parameters") or {"type": "object", "properties": {}}),
        }
        tool = {"type": "function", "function": function}
        if tools.setdefault(function["name"], tool) != tool:
            repairs.append(f"event {event}: tool '{function['name']}' declared otherwise; the first is kept")


def _lower_types(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_lower_types(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: v.lower() if k == "type" and isinstance(v, str) else _lower_types(v) for k, v in schema.items()}


def _messages(said: list[Content], repairs: list[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []  # results of the last model content that no call has taken
    for number, content in enumerate(said):
        parts = content.get("parts") or []
        for part in parts:
            if not {"text", "functionCall", "functionResponse"} & set(part):
                raise Rejected(Code.part, f"message {number}: a part of {sorted(part)} has no place in a text")
        if content.get("role") == "user":
            if any("text" in a and "functionResponse" in b for a, b in pairwise(parts)):
                repairs.append(f"message {number}: text before a tool result comes after it")
            out += [{"role": "user", "content": p["text"]} for p in parts if "text" in p]
        elif content.get("role") == "model":
            waiting = _results_after(said, number)
            turns = _turns(parts)
            if len(turns) > 1:
                repairs.append(f"message {number}: text behind a call starts a new turn")
            for turn in turns:
                out += _turn(turn, waiting, first_call=sum(len(m.get("tool_calls", [])) for m in out) + 1)
            if waiting:
                raise Rejected(
                    Code.orphan_result, f"message {number}: a result of '{waiting[0].get('name')}' answers no call"
                )
        else:
            raise Rejected(Code.shape, f"message {number}: role '{content.get('role')}' is neither user nor model")
    return out


def _results_after(said: list[Content], number: int) -> list[dict[str, Any]]:
    """The tool results between this content and the model's next."""
    found: list[dict[str, Any]] = []
    for content in said[number + 1 :]:
        if content.get("role") == "model":
            break
        found += [p["functionResponse"] for p in content.get("parts") or [] if "functionResponse" in p]
    return found


def _turns(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of one model content as assistant turns: thoughts, text, then calls."""
    turns: list[dict[str, Any]] = [{"thoughts": "", "content": "", "calls": []}]
    for part in parts:
        if "functionCall" in part:
            turns[-1]["calls"].append(part["functionCall"])
        elif part.get("text"):
            if turns[-1]["calls"]:
                turns.append({"thoughts": "", "content": "", "calls": []})
            turns[-1]["thoughts" if part.get("thought") else "content"] += part["text"]
    return turns


def _turn(turn: dict[str, Any], waiting: list[dict[str, Any]], first_call: int) -> list[dict[str, Any]]:
    """An assistant message and the results of its calls, which are taken out of `waiting`: by id, or by name where the
    log gives no id."""
    message: dict[str, Any] = {"role": "assistant", "content": turn["content"]}
    if turn["thoughts"]:
        message["reasoning_content"] = turn["thoughts"]
    calls, results = [], []
    for number, call in enumerate(turn["calls"], first_call):
        name, identity = call.get("name", ""), call.get("id") or f"call_{number}"
        calls.append(
            {"id": identity, "type": "function", "function": {"name": name, "arguments": call.get("args") or {}}}
        )
        same = "id" if call.get("id") else "name"
        result = next((r for r in waiting if r.get(same) == call.get(same)), None)
        if result is not None:
            waiting.remove(result)
            results.append({"role": "tool", "tool_call_id": identity, "name": name, **_output(result)})
    if calls:
        message["tool_calls"] = calls
    return [message, *results]


def _output(result: dict[str, Any]) -> dict[str, Any]:
    response = result.get("response")
    if isinstance(response, dict) and response.get("error") is not None:
        texts = [_text(response[key]) for key in ("output", "error") if response.get(key)]
        return {"content": "\n".join(texts), "is_error": True}
    return {"content": _text(response["output"] if isinstance(response, dict) and "output" in response else response)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
