"""The dialect `responses`: OpenAI's Responses API. The items of one turn become one assistant message, as SGLang 0.5.23 merges them
(`serving_responses.py`)."""

from typing import Any

from data_prep.recorded.forms import AFTER, Answer, Request, objects, unfinished
from data_prep.trajectory import Code, Rejected

_WHOLE = ("completed",)


def request(body: dict[str, Any], notes: list[str]) -> Request:
    """Return what a request says. Raise `Rejected` if it continues a response that a server kept."""
    if previous := body.get("previous_response_id"):
        raise Rejected(
            Code.shape,
            f"its request continues '{previous}', which the server kept and the log does not hold",
            "record with store=false, and the whole conversation is in every request",
        )
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else objects(given, "input")
    system = body.get("instructions")
    messages = [{"role": "system", "content": system}] if system else []
    return Request(messages + _messages(items, notes), objects(body.get("tools") or [], "tools"))


def answer(body: Any, notes: list[str]) -> Answer:
    """Return the answer of a response."""
    messages = _messages(objects(body.get("output") or [], "output"), notes)
    if not messages:
        return Answer(None)
    if len(messages) > 1:
        raise Rejected(Code.shape, "its output holds more than one turn")
    return Answer(messages[0], unfinished(body, "status", _WHOLE))


def _messages(items: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call_output":
            turn = None
            out.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
            continue
        if kind == "message" and item.get("role") != "assistant":
            turn = None
            out.append({"role": str(item.get("role")), "content": item.get("content")})
            continue
        if turn is None:
            turn = {"role": "assistant", "content": []}
            out.append(turn)
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            turn.setdefault("tool_calls", []).append(
                {"id": item.get("call_id"), "type": "function", "function": function}
            )
        elif kind == "message":
            if "tool_calls" in turn:
                notes.append(AFTER)
            content = item.get("content")
            turn["content"] += (
                [{"type": "text", "text": content}] if isinstance(content, str) else objects(content, "content")
            )
        elif kind == "reasoning":
            turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), _thought(item))))
        else:
            raise Rejected(Code.part, f"an item of type '{kind}' cannot become text")
    return [{**m, "content": m["content"] or ""} for m in out]


def _thought(item: dict[str, Any]) -> str:
    content = objects(item.get("content") or [], "the content of a thought")
    if content and all(isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    what = "a summary" if item.get("summary") else "encrypted" if item.get("encrypted_content") else "without text"
    raise Rejected(
        Code.part,
        f"a thought is {what}, so what the model thought is not in the log",
        "record an open model's own thoughts",
    )
