"""One recorded call of a model: what was sent, and what came back, in OpenAI's chat form whatever the dialect on the wire was.

| `dialect` | request | response |
|---|---|---|
| `openai` | chat completions: `messages`, `tools` | `choices` |
| `anthropic` | messages: `system`, `messages`, `tools` | `content` blocks |
| `responses` | OpenAI's Responses: `instructions`, `input`, `tools` | `output` items |
| `gemini` | `contents` or `messages` of parts, `system_instruction`, `tools` of `functionDeclarations` | `candidates` |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_prep.recorded import anthropic, gemini, openai_chat, responses
from data_prep.recorded.forms import Answer, Request
from data_prep.trajectory import Code, Rejected

_REQUESTS: dict[str, Callable[[dict[str, Any], list[str]], Request]] = {
    "openai": openai_chat.request,
    "anthropic": anthropic.request,
    "responses": responses.request,
    "gemini": gemini.request,
}
_ANSWERS: dict[str, Callable[[Any, list[str]], Answer]] = {
    "openai": openai_chat.answer,
    "anthropic": anthropic.answer,
    "responses": responses.answer,
    "gemini": gemini.answer,
}


@dataclass(frozen=True)
class Call:
    """A call. place: where it is in the log, for messages. notes: what could not be taken as it is."""

    place: str
    request: Request
    answer: Answer
    notes: list[str] = field(default_factory=list)


def read_call(
    place: str, sent: Any, returned: Any, dialect: str | None = None, complete: bool = True, status: int | None = None
) -> Call:
    """Return a call of its request and response. dialect: as recorded; None tells it from their fields. complete: whether the answer's
    stream reached its end. Raise `Rejected` for what is no request, or holds what cannot become text.
    """
    if not isinstance(sent, dict):
        raise Rejected(Code.shape, f"{place}: a request is an object, this is {type(sent).__name__}")
    dialect = dialect or dialect_of(sent, returned)
    if dialect not in _REQUESTS:
        raise Rejected(Code.shape, f"{place}: dialect '{dialect}' is not known; known are {', '.join(_REQUESTS)}")
    notes: list[str] = []
    try:
        request = _REQUESTS[dialect](sent, notes)
        failed = returned is None or (status is not None and status >= 400) or _is_error(returned)
        answer = Answer(None) if failed else _ANSWERS[dialect](returned, notes)
    except Rejected as error:
        raise Rejected(error.code, f"{place}: {error.problem}", error.fix) from error
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise Rejected(Code.shape, f"{place}: it is no call in the dialect '{dialect}': {error}") from error
    if failed:
        notes.append("has no answer")
    elif not complete:
        answer = Answer(answer.message, "its stream was cut")
    return Call(place, request, answer, notes)


def dialect_of(sent: dict[str, Any], returned: Any) -> str:
    """Return the dialect of a call, by the fields of its request and response."""
    said = returned if isinstance(returned, dict) else {}
    messages = sent.get("messages") if isinstance(sent.get("messages"), list) else []
    parted = [m for m in messages or [] if isinstance(m, dict) and "parts" in m]
    if "contents" in sent or "system_instruction" in sent or "candidates" in said or parted:
        return "gemini"
    if "input" in sent or "output" in said:
        return "responses"
    tools = sent.get("tools") if isinstance(sent.get("tools"), list) else []
    flat = any(isinstance(t, dict) and "input_schema" in t for t in tools or [])
    if "system" in sent or said.get("type") == "message" or flat:
        return "anthropic"
    return "openai"


def _is_error(returned: Any) -> bool:
    return isinstance(returned, dict) and (returned.get("type") == "error" or returned.get("error") not in (None, {}))
