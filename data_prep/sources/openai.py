"""Source `openai`: chat-completion messages as most tools and servers write them, as JSON Lines or one JSON array.

| OpenAI | trajectory |
|---|---|
| `id`, if present | `id` |
| role `developer` | `system` |
| role `function` with `name` | `tool`, the result of the open call of that name |
| `content`: text, null, or a list of text parts | text; null becomes empty, parts are joined |
| `reasoning_content`, `reasoning` | `reasoning_content` |
| `<think>…</think>` at the start of an assistant's content | `reasoning_content`, as the chat templates read it |
| `arguments`: JSON text or an object | the object |
| `function_call` | one tool call, with an id made from the message index |
| `functions` | `tools` |
| `weight` 0 or 1 | `weight` |
| other fields that are null or empty | omitted |

Any other field rejects the record; the message names the field. Arguments that are not a JSON object also reject it.
"""

import re
from typing import Any

from data_prep.records import json_records, parse
from data_prep.trajectory import Code, Rejected

records = json_records

_INLINE = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)


def convert(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return a chat-completion record as `{id, messages, tools}` and append each repair to `repairs`."""
    unknown = sorted(set(record) - {"id", "messages", "tools", "functions"})
    if unknown:
        raise Rejected(
            Code.shape,
            f"unknown field {', '.join(unknown)}; a record has id, messages and tools",
            "remove it from the data",
        )
    tools = [*(record.get("tools") or [])]
    tools += [{"type": "function", "function": f} for f in record.get("functions") or []]
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Rejected(Code.shape, "messages is not a list of objects")
    out: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        out.append(_message(message, number, out, repairs))
    return {"id": record.get("id"), "messages": out, "tools": tools}


def _message(message: dict[str, Any], number: int, before: list[dict[str, Any]], repairs: list[str]) -> dict[str, Any]:
    out = {k: v for k, v in message.items() if v not in (None, "", [], {}) and k != "content"}
    for one, other in (("reasoning", "reasoning_content"), ("function_call", "tool_calls")):
        if one in out and other in out:
            raise Rejected(Code.shape, f"message {number}: has both {one} and {other}")
    content = message.get("content")
    out["content"] = _text(content, number)
    if isinstance(content, list) and len(content) > 1:
        repairs.append(f"message {number}: {len(content)} parts joined without anything between them")
    role = out.get("role")
    if role == "developer":
        out["role"] = "system"
        repairs.append(f"message {number}: role developer read as system")
    elif role == "function":
        open_calls = [c for m in before for c in m.get("tool_calls", [])]
        answered = {m.get("tool_call_id") for m in before}
        call = next(
            (c for c in open_calls if c["id"] not in answered and c["function"]["name"] == out.get("name")), None
        )
        if call is None:
            raise Rejected(
                Code.orphan_result, f"message {number}: function result '{out.get('name')}' answers no open call"
            )
        out |= {"role": "tool", "tool_call_id": call["id"]}
    if "reasoning" in out:
        out["reasoning_content"] = out.pop("reasoning")
    if "function_call" in out:
        out["tool_calls"] = [{"id": f"call_{number}", "type": "function", "function": out.pop("function_call")}]
    if isinstance(out.get("tool_calls"), list):
        out["tool_calls"] = [_call(call, number) for call in out["tool_calls"]]
    inline = _INLINE.fullmatch(out["content"]) if role == "assistant" and "reasoning_content" not in out else None
    if inline:
        out["reasoning_content"], out["content"] = inline.groups()
        repairs.append(f"message {number}: thinking moved out of the content")
    return out


def _text(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in ("text", "input_text", "output_text"):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Rejected(Code.part, f"message {number}: a part of type '{kind}' cannot become text")
            if set(part) != {"type", "text"} or not isinstance(part["text"], str):
                raise Rejected(Code.part, f"message {number}: a text part has type and text, this one {sorted(part)}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Rejected(Code.shape, f"message {number}: content is {type(content).__name__}, not text")
    return content


def _call(call: Any, number: int) -> Any:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise Rejected(Code.shape, f"message {number}: a tool call is {{id, type, function}}")
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse(arguments.encode("utf-8", "surrogatepass"))
        except Rejected as error:
            raise Rejected(
                Code.arguments, f"message {number}: arguments of '{function.get('name')}': {error}"
            ) from error
    if not isinstance(arguments, dict):
        raise Rejected(
            Code.arguments,
            f"message {number}: arguments of '{function.get('name')}' are {type(arguments).__name__}, not an object",
        )
    fields = {k: v for k, v in call.items() if k != "index"}
    return {**fields, "function": {**function, "arguments": arguments}}
