"""The dialect `anthropic`: messages of content blocks, as they are on the wire and in Claude Code's sessions.

Blocks become what SGLang 0.5.23 makes of them on /v1/messages (`entrypoints/anthropic/serving.py`): system blocks and thoughts are
joined with a line break, text before a tool result stays before it, and text after a call goes before it.
"""

from typing import Any

from data_prep.recorded.forms import AFTER, Answer, Request, objects, unfinished
from data_prep.trajectory import Code, Rejected

WHOLE = ("end_turn", "tool_use", "stop_sequence")
_SILENT = frozenset(("cache_control", "citations", "signature", "caller"))


def request(body: dict[str, Any], notes: list[str]) -> Request:
    """Return what a request says."""
    system = body.get("system")
    if isinstance(system, list):
        system = "\n".join(str(block["text"]) for block in objects(system, "system") if block.get("text"))
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for message in objects(body.get("messages"), "messages"):
        messages += chat_messages(str(message.get("role")), message.get("content"), notes)
    return Request(messages, objects(body.get("tools") or [], "tools"))


def answer(body: Any, notes: list[str]) -> Answer:
    """Return the answer of a response."""
    content = body.get("content")
    if not content:
        return Answer(None)
    (message,) = chat_messages("assistant", content, notes)
    return Answer(message, unfinished(body, "stop_reason", WHOLE))


def chat_messages(role: str, content: Any, notes: list[str]) -> list[dict[str, Any]]:
    """Return one message of blocks as chat messages: a user's tool results are messages of their own.

    Raise `Rejected` for a block that cannot become text, such as an image or an encrypted thought.
    """
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = objects(content, "content")
    if role == "assistant":
        return [_assistant(blocks, notes)]
    out: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block))
        elif kind == "tool_result":
            out += [{"role": role, "content": texts}] if texts else []
            texts = []
            failed = {"is_error": True} if block.get("is_error") else {}
            out.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result(block), **failed})
        else:
            raise Rejected(Code.part, f"a block of type '{kind}' cannot become text")
    return out + ([{"role": role, "content": texts}] if texts else [])


def _assistant(blocks: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    thoughts: list[str] = []
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            if not block.get("thinking") and block.get("signature"):
                raise Rejected(
                    Code.part, "a thought was left out of the log (thinking is empty), so what was thought is not known"
                )
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "text":
            if calls:
                notes.append(AFTER)
            texts.append(_text(block))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "redacted_thinking":
            raise Rejected(Code.part, "an encrypted thought (redacted_thinking) cannot become text")
        else:
            raise Rejected(Code.part, f"a block of type '{kind}' cannot become text")
    message["content"] = texts if texts else ""
    if thought := "\n".join(filter(None, thoughts)):
        message["reasoning_content"] = thought
    return message | ({"tool_calls": calls} if calls else {})


def _text(block: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k not in _SILENT}


def _result(block: dict[str, Any]) -> Any:
    content = block.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = objects(content, "the content of a tool result")
    if other := next((p for p in parts if p.get("type") != "text"), None):
        raise Rejected(Code.part, f"a tool result has a part of type '{other.get('type')}', which cannot become text")
    return [_text(p) for p in parts if p.get("text")] or ""
