"""What every dialect becomes: a request and an answer in OpenAI's chat form, which `data_prep/normalise/` mends later."""

from dataclasses import dataclass
from typing import Any

from data_prep.trajectory import Code, Rejected

AFTER = "text after a call was moved before it: no chat template can render it there"


@dataclass(frozen=True)
class Request:
    """What was sent: messages and tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What came back: an assistant message; None if the call failed. unfinished: why it is not whole; None if it is."""

    message: dict[str, Any] | None
    unfinished: str | None = None


def unfinished(body: dict[str, Any], key: str, whole: tuple[str, ...]) -> str | None:
    """Return why an answer is not whole: it says that it ended otherwise than in one of these ways. None if it is, or says nothing."""
    if key not in body or body[key] in whole:
        return None
    return f"it ended with {key} {body[key]!r}"


def listed(value: Any, name: str) -> list[Any]:
    """Return a list. Raise `Rejected` for any other value."""
    if not isinstance(value, list):
        raise Rejected(Code.shape, f"{name} is {type(value).__name__}, not a list")
    return value


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Return a list of objects. Raise `Rejected` for any other value."""
    if not all(isinstance(one, dict) for one in listed(value, name)):
        raise Rejected(Code.shape, f"{name} holds something else than objects")
    return value
