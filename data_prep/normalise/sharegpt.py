"""ShareGPT's form of a conversation, and LLaMA-Factory's calls in it.

| in a record | becomes |
|---|---|
| `conversations[]` of `{from, value}` | `messages` |
| `from`: human, user; gpt, chatgpt, assistant, bing, bard; system | user; assistant; system |
| `from: function_call`, `value` text and then JSON of `{name, arguments}` or a list of such | an assistant message with calls |
| `from: observation`, tool, function_response, ipython | the result of the open call |
| column `system` | the first system message |
| `content[]` of `{type, value}`: text, reasoning, tool_call | text parts, `reasoning_content`, calls (LLaMA-Factory's newer form) |
"""

import json
from typing import Any

from data_prep.trajectory import Code, Rejected

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "function_response", "ipython", "tool_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")


def is_sharegpt(messages: Any) -> bool:
    """Return whether these are messages of `{from, value}`."""
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in messages)
    )


def from_sharegpt(messages: list[dict[str, Any]], system: Any, repairs: list[str]) -> list[dict[str, Any]]:
    """Return the messages in chat form. Raise `Rejected` for a role that is not known, or a call that cannot be read."""
    repairs.append("from and value read as role and content")
    out = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for number, message in enumerate(messages):
        said, value = message["from"], message["value"]
        others = {k: v for k, v in message.items() if k not in ("from", "value")}
        if said in _CALLS:
            out.append({**_calls(value, number), **others})
        elif said in _ROLES:
            out.append({"role": _ROLES[said], "content": value, **others})
        else:
            raise Rejected(
                Code.shape,
                f"message {number}: from is {said!r}, which is not known; known are {', '.join((*_ROLES, *_CALLS))}",
                "write role and content instead of from and value",
            )
    return out


def from_values(message: dict[str, Any], number: int, repairs: list[str]) -> dict[str, Any]:
    """Return a message with content of `{type, value}` in chat form, and any other message as it is."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.keys() == {"type", "value"} for p in content):
        return message
    if not content:
        return message
    out = {**message, "content": [{"type": p["type"], "text": p["value"]} for p in content if p["type"] == "text"]}
    if thoughts := [str(p["value"]) for p in content if p["type"] == "reasoning"]:
        out["reasoning_content"] = "\n".join(thoughts)
    if calls := [c for p in content if p["type"] == "tool_call" for c in _calls(p["value"], number)["tool_calls"]]:
        out["tool_calls"] = calls
    if others := sorted({str(p["type"]) for p in content} - {"text", "reasoning", "tool_call"}):
        raise Rejected(Code.part, f"message {number}: a part of type '{others[0]}' cannot become text")
    if (said := "parts of type and value read as text, reasoning and calls") not in repairs:
        repairs.append(said)
    return {**out, "content": out["content"] or ""}


def _calls(value: Any, number: int) -> dict[str, Any]:
    """Return the message of a turn that calls: text, and then JSON of one call or of several."""
    text = value if isinstance(value, str) else json.dumps(value)
    for start in sorted({0, *(at for at, c in enumerate(text) if c in "[{")}):
        try:
            found = json.loads(text[start:])
        except (ValueError, RecursionError):
            continue
        calls = found if isinstance(found, list) else [found]
        if calls and all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
            functions = [{"name": c["name"], "arguments": c.get("arguments", c.get("parameters", {}))} for c in calls]
            message = {"role": "assistant", "content": text[:start].strip()}
            return {**message, "tool_calls": [{"type": "function", "function": f} for f in functions]}
    raise Rejected(
        Code.arguments, f"message {number}: a function_call is JSON of name and arguments, this is {text[:60]!r}"
    )
