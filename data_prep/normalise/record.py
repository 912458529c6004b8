"""The one place where a record is mended: what Arrow, JSON text, dialects and servers did to it. Every repair is named.

A source maps names; this turns `{id?, messages, tools, …}` into what `trajectory.py` validates. Columns that are no messages become
`metadata`, which no template sees.

| in a record | becomes |
|---|---|
| `messages`, `tools`, `tool_calls`, `arguments` as JSON text | what they say |
| `functions`, tools of Anthropic's and of the Responses API | function tools |
| null keywords of a schema, null arguments that the schema has no place for | nothing |
| role `developer`; role `function` with `name` | `system`; `tool`, the result of the open call of that name |
| `content`: null, or a list of text parts | text, joined as SGLang joins it |
| `reasoning`, `thinking`, …; `<think>…</think>` at the start of a turn | `reasoning_content`, as the chat templates read it |
| `function_call` | one tool call |
| `conversations` of `{from, value}`, parts of `{type, value}` | `messages` (`sharegpt.py`) |
| `train`, `loss_mask`, `loss`, … | `weight` |
| missing ids, ids used again | ids of their own |
| other columns; other fields of a message | `metadata`; left out or refused by name (`fields.py`) |
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_prep.normalise.calls import from_text, normal_calls, paired
from data_prep.normalise.fields import DETAILS, REASONING, sorted_out, weight
from data_prep.normalise.sharegpt import from_sharegpt, from_values, is_sharegpt
from data_prep.normalise.tool_forms import normal_tools, schemas_of
from data_prep.records import parse
from data_prep.trajectory import Code, Rejected
from recipes.config import BrokenCalls

_RECORD = ("id", "messages", "tools", "functions", "metadata")
# Columns that hold the conversation under another name, or in another form.
_ELSEWHERE = ("trajectory", "conversations", "conversation", "history", "dialog", "dialogue", "chat", "turns", "prompt")
_PART_SILENT = frozenset(("cache_control", "annotations", "citations", "logprobs", "id", "signature"))


@dataclass(frozen=True)
class Joins:
    """What a server puts between the text parts of a message: of a tool's result, and of any other. SGLang 0.5.23 puts a space, except
    where the template itself takes lists of parts."""

    result: str = " "
    other: str = " "


def normalise(
    record: dict[str, Any], joins: Joins, repairs: list[str], broken_calls: BrokenCalls = BrokenCalls.reject
) -> dict[str, Any]:
    """Return `{id?, messages, tools, metadata}` and append each repair to `repairs`. Raise `Rejected` for what cannot be mended."""
    elsewhere = record.get("messages") is None and is_sharegpt(record.get("conversations"))
    spoken = "conversations" if elsewhere else "messages"
    metadata = {k: v for k, v in record.items() if k not in (*_RECORD, spoken) and v is not None}
    given = record.get("metadata")
    if given not in (None, {}):
        metadata |= given if isinstance(given, dict) else {"metadata": given}
    messages = from_text(record.get(spoken), spoken, repairs)
    if is_sharegpt(messages):
        messages = from_sharegpt(messages, metadata.pop("system", None), repairs)
    if messages is None:
        raise Rejected(Code.shape, "a record has no messages", _column(record))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Rejected(Code.shape, f"messages must be a list of objects, this is {str(messages)[:80]}")
    tools = normal_tools(record.get("tools"), record.get("functions"), messages, repairs)
    if not tools and (column := tools_column(metadata)):
        raise Rejected(
            Code.tool,
            f"a record has no tools, and its column '{column}' looks like them",
            f"write data.columns.tools={column}",
        )
    schemas = schemas_of(tools)
    out: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        try:
            out.append(_message(from_values(message, number, repairs), number, schemas, joins, repairs))
        except Rejected as error:
            if error.code is not Code.arguments:
                raise
            if broken_calls is BrokenCalls.reject:
                fix = "write data.broken_calls=cut to keep what comes before it"
                raise Rejected(error.code, error.problem, error.fix or fix) from error
            repairs.append(f"{error.problem}: {len(messages) - number} messages from there on left out")
            break
    paired(out, repairs)
    for number, (one, other) in enumerate(pairwise(out)):
        if one.get("role") == other.get("role") == "assistant":
            repairs.append(f"messages {number} and {number + 1} are both of the assistant")
    if columns := sorted(k for k in metadata if k in record and k != "metadata"):
        repairs.append(f"kept as metadata: {', '.join(columns)}")
    return {"id": record.get("id"), "messages": out, "tools": tools, "metadata": metadata}


def _column(record: dict[str, Any]) -> str:
    """Return what to write for a record without messages."""
    there = [name for name, value in record.items() if any("role" in one for one in _objects(value))]
    there += [name for name in _ELSEWHERE if record.get(name)]
    if there:
        return f"write data.columns.messages={there[0]} if its messages are there"
    return f"write data.columns.messages=NAME of the column that has them; this record has {', '.join(record) or 'no column'}"


def tools_column(metadata: dict[str, Any]) -> str | None:
    """Return the column that holds tools under another name."""
    for name, value in metadata.items():
        objects = _objects(value)
        if objects and all("function" in one or "parameters" in one for one in objects):
            return name
    return None


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list, given as it is or as JSON text; nothing for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse(value.encode("utf-8", "surrogatepass"))
        except Rejected:
            return []
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else []


def _message(
    message: dict[str, Any], number: int, schemas: dict[str, Any], joins: Joins, repairs: list[str]
) -> dict[str, Any]:
    out = {k: v for k, v in sorted_out(message, number, repairs).items() if v is not None}
    if (learned := weight(out, number, repairs)) is not None:
        out["weight"] = learned
    role = out.get("role")
    if role == "developer":
        role = out["role"] = "system"
        repairs.append(f"message {number}: role developer read as system")
    elif role == "function":
        role = out["role"] = "tool"
        repairs.append(f"message {number}: role function read as tool")
    if out.get("unsupervised") and not isinstance(message.get("content"), str):
        raise Rejected(Code.shape, f"message {number} has unsupervised characters, and a content that is no text")
    out["content"] = _text(message.get("content"), number, str(role), joins, repairs)
    _reasoning(out, number, repairs)
    calls = from_text(out.pop("tool_calls", None), f"message {number}: tool_calls", repairs)
    if (single := out.pop("function_call", None)) not in (None, {}):
        if calls:
            raise Rejected(Code.shape, f"message {number}: has both function_call and tool_calls")
        calls = [{"type": "function", "function": single}]
    if calls not in (None, []):
        out["tool_calls"] = normal_calls(calls, number, schemas, repairs)
    for name in ("tool_call_id", "name"):
        if out.get(name) == "":
            del out[name]
    if role == "assistant" and "reasoning_content" not in out:
        _inline(out, number, repairs)
    return out


def _reasoning(out: dict[str, Any], number: int, repairs: list[str]) -> None:
    """Leave one `reasoning_content`, by whatever names the record has it. Lists of thoughts count only where nothing else says it."""
    details = {name: out.pop(name) for name in DETAILS if name in out}
    details = {name: value for name, value in details.items() if value not in ("", [], {})}
    said = {name: out.pop(name) for name in REASONING if name in out}
    said = {name: text for name, text in said.items() if text not in ("", [], {})}
    if details and not said:
        name, value = next(iter(details.items()))
        said = {name: _details(value, f"message {number}: {name}")}
    elif details:
        repairs.append(f"message {number}: {', '.join(details)} left out beside {', '.join(said)}")
    if not said:
        return
    if any(text != next(iter(said.values())) for text in said.values()):
        raise Rejected(Code.shape, f"message {number}: has both {' and '.join(said)}, and they differ")
    out["reasoning_content"] = next(iter(said.values()))
    if names := [name for name in said if name != "reasoning_content"]:
        repairs.append(f"message {number}: {', '.join(names)} read as reasoning_content")


def _details(value: Any, what: str) -> str:
    """Return the text of a list of thoughts. Raise `Rejected` if a thought has none, because it is encrypted or of another form."""
    thoughts = value if isinstance(value, list) else [value]
    texts = [t.get("text", t.get("thinking")) if isinstance(t, dict) else None for t in thoughts]
    if not all(isinstance(text, str) for text in texts):
        raise Rejected(
            Code.shape,
            f"{what} holds a thought without text, such as an encrypted one",
            "write what is known as reasoning_content",
        )
    return "".join(map(str, texts))


def _inline(out: dict[str, Any], number: int, repairs: list[str]) -> None:
    """Move a thought at the start of the content to `reasoning_content`, as the official templates read it: up to `</think>`, with or
    without its opening. Content that has text before the opening, or a second thought, is left as it is."""
    before, end, after = out["content"].partition("</think>")
    opening, _, thought = before.rpartition("<think>")
    if not end or "</think>" in after or opening.replace("<think>", "").strip():
        return
    if out.get("unsupervised"):
        raise Rejected(
            Code.shape,
            f"message {number} has unsupervised characters and a thought in its content, which is moved out of it",
            "write the thought as reasoning_content, and count the characters of the rest",
        )
    out["reasoning_content"], out["content"] = (
        (thought if "<think>" in before else before).strip("\n"),
        after.lstrip("\n"),
    )
    repairs.append(f"message {number}: thinking moved out of the content")


def _text(content: Any, number: int, role: str, joins: Joins, repairs: list[str]) -> str:
    if content is None:
        repairs.append(f"message {number}: null content read as empty")
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(p, dict) and "type" in p for p in content):
        if isinstance(content, list | dict):
            raise Rejected(
                Code.part,
                f"message {number}: its content is data, {str(content)[:60]}, and a message has text",
                "write the JSON text that the model saw, as content",
            )
        raise Rejected(Code.shape, f"message {number}: content is {type(content).__name__}, not text")
    silent: set[str] = set()
    for part in content:
        if part["type"] not in ("text", "input_text", "output_text"):
            raise Rejected(Code.part, f"message {number}: a part of type '{part['type']}' cannot become text")
        others = {k for k, v in part.items() if k not in ("type", "text") and v not in (None, [], {})}
        if not isinstance(part.get("text"), str) or others - _PART_SILENT:
            raise Rejected(Code.part, f"message {number}: a text part has type and text, this one {sorted(part)}")
        silent |= others
    if silent:
        repairs.append(f"message {number}: {', '.join(sorted(silent))} of a part left out, which no template shows")
    if len(content) > 1:
        join = joins.result if role == "tool" else joins.other
        with_what = {" ": "a space", "": "nothing"}.get(join, repr(join))
        repairs.append(f"message {number}: {len(content)} parts joined with {with_what} between them, as SGLang does")
        return join.join(part["text"] for part in content)
    return "".join(part["text"] for part in content)
