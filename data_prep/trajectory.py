"""Contract 1: one trajectory, `{id, messages, tools}` in OpenAI form, validated.

Arguments are always an object. What a source had to repair is named in `repairs` and goes to the ledger.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recipes.errors import DataError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Function(_Strict):
    name: str = Field(min_length=1)
    arguments: dict[str, Any]


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(_Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _fields_of_role(self) -> "Message":
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError(f"a {self.role} message has tool_calls or reasoning_content, which only an assistant has")
        return self


class Trajectory(_Strict):
    id: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]]
    repairs: list[str] = []

    @model_validator(mode="after")
    def _turns_and_results(self) -> "Trajectory":
        seen: set[str] = set()
        open_calls: set[str] = set()
        for number, m in enumerate(self.messages):
            if m.role == "tool":
                if m.tool_call_id is None or m.tool_call_id not in open_calls:
                    raise ValueError(f"message {number}: tool result '{m.tool_call_id}' answers no open call")
                open_calls.remove(m.tool_call_id)
                continue
            if open_calls:
                raise ValueError(f"message {number}: calls {sorted(open_calls)} have no result")
            for call in m.tool_calls or []:
                if call.id in seen:
                    raise ValueError(f"message {number}: call id '{call.id}' is used twice")
                seen.add(call.id)
                open_calls.add(call.id)
        if not any(m.role == "assistant" for m in self.messages):
            raise ValueError("no assistant turn: there is nothing to learn")
        return self

    def chat(self) -> list[dict[str, Any]]:
        """Messages as `apply_chat_template` and an OpenAI-compatible server take them, absent fields left out."""
        return [m.model_dump(exclude_none=True) for m in self.messages]


def validate(record: dict[str, Any], place: str) -> Trajectory:
    """The record as a `Trajectory`, or a `DataError` that names `place` and the first thing that is wrong."""
    try:
        return Trajectory.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{place}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from error
