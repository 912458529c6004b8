"""The dialect `openai`: chat completions."""

from typing import Any

from data_prep.recorded.forms import Answer, Request, objects, unfinished

_WHOLE = ("stop", "tool_calls", "function_call", "eos")
# Fields of an answer that a message of the history does not have.
_OF_ANSWER = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content", "reasoning")


def request(body: dict[str, Any], notes: list[str]) -> Request:
    """Return what a request says."""
    tools = objects(body.get("tools") or [], "tools")
    tools += [{"type": "function", "function": f} for f in objects(body.get("functions") or [], "functions")]
    return Request(objects(body.get("messages"), "messages"), tools)


def answer(body: Any, notes: list[str]) -> Answer:
    """Return the answer of a response."""
    choices = objects(body.get("choices") or [], "choices")
    if not choices or not isinstance(choices[0].get("message"), dict):
        return Answer(None)
    if len(choices) > 1:
        notes.append(f"has {len(choices)} choices; the first is used")
    said = choices[0]["message"]
    message = {k: v for k, v in said.items() if k not in _OF_ANSWER or v not in (None, "", [], {})}
    return Answer({**message, "role": "assistant"}, unfinished(choices[0], "finish_reason", _WHOLE))
