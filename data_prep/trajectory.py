"""Contract 1: one validated trajectory, `{id, messages, tools}` in OpenAI format.

Call arguments are always an object. `repairs` lists what had to be repaired; it goes to the ledger. `metadata` is what else the record
has; no template sees it. A record that is
not a valid trajectory raises `Rejected` with a code from `Code`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Literal

from jsonschema.protocols import Validator
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from data_prep import tool_schemas
from recipes.errors import DataError


class Code(StrEnum):
    """Why a record was rejected, as written to `ledger.jsonl`."""

    utf8 = "utf8"  # bytes that are not UTF-8
    json = "json"  # text that is not JSON
    text = "text"  # a NUL or a lone surrogate in a text
    shape = "shape"  # a field is missing, unknown or of the wrong type
    arguments = "arguments"  # a call's arguments are not an object
    part = "part"  # a kind of content that no chat template can render
    diverged = "diverged"  # requests of an event log that do not form one conversation
    orphan_result = "orphan_result"  # a tool result that answers no open call
    missing_result = "missing_result"  # a call without a result before the next turn
    duplicate_call = "duplicate_call"  # a call id used twice
    duplicate_id = "duplicate_id"  # a trajectory's id used twice
    tool = "tool"  # a tool without a name or a valid schema, or one name twice
    schema = "schema"  # arguments that break their tool's schema, or a call of a tool that is not declared
    special_token = "special_token"  # noqa: S105  # the tokenizer's control tokens as text in content
    template = "template"  # the chat template fails, or omits part of an assistant message
    no_supervised = "no_supervised"  # no supervised token
    position_zero = "position_zero"  # the first supervised token has nothing before it
    too_long = "too_long"  # over data.max_tokens


class Rejected(DataError):
    """A rejected record, with its code and, if it has one, its id. `str()` gives the reason."""

    def __init__(self, code: Code, problem: str, fix: str = "", identity: str | None = None) -> None:
        super().__init__(problem, fix)
        self.args = (code, problem, fix, identity)  # pickle rebuilds it from these
        self.code = code
        self.identity = identity


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Function(_Strict):
    """The function of a tool call, with its arguments as an object."""

    name: str = Field(min_length=1)
    arguments: dict[str, Any]


class ToolCall(_Strict):
    """A tool call of an assistant message."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: Function


class Message(_Strict):
    """One message.

    weight: 0 excludes an assistant turn from supervision. unsupervised: [start, end) characters of an assistant's content that are not
    learned. is_error: the tool failed. The chat template sees none of the three.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    tool_call_id: str | None = None
    name: str | None = None
    weight: Literal[0, 1] | None = None
    unsupervised: list[list[int]] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _fields_of_role(self) -> "Message":
        own = {
            "assistant": ("reasoning_content", "tool_calls", "weight", "unsupervised"),
            "tool": ("tool_call_id", "is_error"),
        }
        for role, names in own.items():
            for name in names:
                if self.role != role and getattr(self, name) is not None:
                    raise ValueError(f"a {self.role} message has {name}, which only a message of role {role} has")
        end = 0
        for span in self.unsupervised or []:
            if len(span) != 2 or not end <= span[0] < span[1] <= len(self.content):
                raise ValueError(
                    f"unsupervised has {span}: spans are [start, end], in order, apart, and within content, which has "
                    f"{len(self.content)} characters"
                )
            end = span[1]
        return self


class Trajectory(_Strict):
    """A validated trajectory: every tool result answers a call, and there is at least one assistant message."""

    id: str = Field(min_length=1)
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]]
    repairs: list[str] = []
    metadata: dict[str, Any] = {}
    open_calls: bool = False  # whether a message may come before the result of a call

    @model_validator(mode="after")
    def _calls_and_results(self) -> "Trajectory":
        seen: set[str] = set()
        waiting: dict[str, None] = {}
        for number, m in enumerate(self.messages):
            if m.role == "tool":
                if m.tool_call_id not in waiting:
                    raise _error(
                        Code.orphan_result, f"message {number}: tool result '{m.tool_call_id}' answers no open call"
                    )
                del waiting[m.tool_call_id]
                continue
            if waiting and not self.open_calls:
                raise _error(Code.missing_result, f"message {number}: calls {[*waiting]} have no result")
            for call in m.tool_calls or []:
                if call.id in seen:
                    raise _error(Code.duplicate_call, f"message {number}: call id '{call.id}' is used twice")
                seen.add(call.id)
                waiting[call.id] = None
        if waiting and not self.open_calls and self.messages[-1].role == "tool":
            raise _error(
                Code.missing_result, f"calls {[*waiting]} have no result, though others of the same turn have one"
            )
        if not self.assistant_turns():
            raise _error(Code.no_supervised, "no assistant turn: there is nothing to learn")
        return self

    def chat(self) -> list[dict[str, Any]]:
        """Return the messages as `apply_chat_template` and OpenAI-compatible servers expect them, without absent fields."""
        return [m.model_dump(exclude_none=True, exclude={"weight", "unsupervised", "is_error"}) for m in self.messages]

    def content_hash(self) -> str:
        """Return the SHA-256 of messages and tools. It does not depend on the record's id, key order or repairs."""
        content = {"messages": [m.model_dump(exclude_none=True) for m in self.messages], "tools": self.tools}
        canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def assistant_turns(self) -> list[int]:
        """Return the indices of the assistant messages."""
        return [k for k, m in enumerate(self.messages) if m.role == "assistant"]

    def faulty_calls(self) -> Iterator[tuple[int, str]]:
        """Yield (message index, fault) for every call that breaks its tool's schema. Raise `Rejected` for an invalid tool."""
        validators = _validators(self.tools)
        for number, m in enumerate(self.messages):
            for call in m.tool_calls or []:
                if call.function.name not in validators:
                    yield number, f"calls '{call.function.name}', which is not among the tools"
                    continue
                validator = validators[call.function.name]
                if validator is None:
                    continue
                try:
                    error = next(validator.iter_errors(call.function.arguments), None)
                except Exception as failure:  # a schema can make its validator raise any exception
                    raise Rejected(
                        Code.tool, f"tool '{call.function.name}': its schema cannot be used: {_short(str(failure))}"
                    ) from failure
                if error:
                    yield number, f"{call.function.name}: {_short(error.message)} (at '{error.json_path}')"

    def unjudged(self) -> list[str]:
        """Return the names of the tools whose schema judges nothing, because it is none."""
        return [name for name, validator in _validators(self.tools).items() if validator is None]

    def map_texts(self, change: Callable[[str], str]) -> "Trajectory":
        """Return this trajectory with `change` applied to every text that a template could render, in messages and tools."""

        def changed(value: Any) -> Any:
            if isinstance(value, str):
                return change(value)
            if isinstance(value, list):
                return [changed(v) for v in value]
            if not isinstance(value, dict):
                return value
            out = {change(k): changed(v) for k, v in value.items()}
            if len(out) < len(value):
                raise Rejected(Code.special_token, f"two keys of {[*value]} become one when they are escaped")
            return out

        messages = [changed(m.model_dump(exclude_none=True)) for m in self.messages]
        for message, m in zip(messages, self.messages, strict=True):
            if m.unsupervised:  # where the same characters are now
                message["unsupervised"] = [[len(change(m.content[:at])) for at in span] for span in m.unsupervised]
        own = {"id": self.id, "repairs": self.repairs, "metadata": self.metadata, "open_calls": self.open_calls}
        return validate({**own, "messages": messages, "tools": changed(self.tools)})

    def texts(self) -> Iterator[str]:
        """Yield every text in messages and tools, including keys."""
        for m in self.messages:
            yield m.content
            yield from (t for t in (m.reasoning_content, m.tool_call_id, m.name) if t)
            for call in m.tool_calls or []:
                yield call.id
                yield call.function.name
                yield from _texts(call.function.arguments)
        yield from _texts(self.tools)


def validate(record: dict[str, Any]) -> Trajectory:
    """Return the record as a `Trajectory`. Raise `Rejected` for the first fault."""
    try:
        return Trajectory.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        code = Code(first["type"]) if first["type"] in set(Code) else Code.shape
        if where.endswith("function.arguments"):
            code = Code.arguments
        fixes = {Code.missing_result: "write data.open_calls=keep to keep the record as it is"}
        message = _short(first["msg"].removeprefix("Value error, "))
        raise Rejected(code, f"{where + ': ' if where else ''}{message}", fixes.get(code, "")) from error


def _validators(tools: list[dict[str, Any]]) -> dict[str, Validator | None]:
    """Return one validator per tool name; None for a tool whose schema judges nothing. Raise `Rejected` for what is no tool."""
    functions: dict[str, Any] = {}
    for number, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise Rejected(Code.tool, f"tool {number} is not {{type: 'function', function: {{name, …}}}}")
        if name in functions:
            raise Rejected(Code.tool, f"tool {number}: the name '{name}' is used twice")
        assert isinstance(function, dict)
        functions[name] = {"name": name, "parameters": function.get("parameters")}
    return tool_schemas.validators(json.dumps([*functions.values()], ensure_ascii=False))


def _error(code: Code, message: str) -> PydanticCustomError:
    # Pass the message as a value: in the template its braces would be read as a format.
    return PydanticCustomError(code, "{message}", {"message": message})


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
