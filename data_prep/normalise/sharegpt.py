"""ShareGPT's form of a conversation, and LLaMA-Factory's calls in it.

| in a record | becomes |
|---|---|
| `conversations[]` of `{from, value}` | `messages` |
| `from`: human, user; gpt, chatgpt, assistant, bing, bard; system | user; assistant; system |
| `from: function_call`, `value` text and then JSON of `{name, arguments}` or a list of such | an assistant message with calls |
| `from: observation`, tool, function_response, ipython | the result of the open call |
| column `system` | the first system message |
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
