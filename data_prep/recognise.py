"""What a file of trajectories is, told from its shape: `data=auto`, and the advice for a file that another source cannot read."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.normalise.record import tools_column
from data_prep.records import documents, files_of, parse
from data_prep.trajectory import Rejected
from recipes.config import Recipe
from recipes.errors import ConfigError, DataError

AUTO = "auto"
_READ = 20  # documents that are looked at
_CODEX = {"session_meta", "turn_context", "response_item", "event_msg", "compacted"}
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_LOG_INSTEAD = "record the calls instead, and read them with data=requests"
Document = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of trajectories.

    source: the one that reads it; None if none does. columns: options of it that are needed, by name. fix: what to do, or what else to
    write.
    """

    what: str
    source: str | None = None
    fix: str = ""
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The overrides that read it."""
        return " ".join([f"data={self.source}", *(f"data.columns.{k}={v}" for k, v in self.columns.items())])


def recognise(path: Path) -> Form | None:
    """Return the form of a file, or of a folder's first file. None: nothing is known of its shape."""
    for file in files_of(path)[:1]:
        if file.name.endswith(".eval"):
            return Form("a log of inspect", None, _LOG_INSTEAD)
        found: list[Document] = []
        for document in islice(documents(file), _READ):
            try:
                value = parse(document.raw)
            except Rejected:
                continue
            found += [value] if isinstance(value, dict) else []
        for test in _TESTS:
            if found and (form := test(found)):
                return form
    return None


def recognised(recipe: Recipe, path: Path, option: str) -> Recipe:
    """Return the recipe with the source that reads the file, and say which. Raise `ConfigError` if none does."""
    form = recognise(path)
    if form is None:
        raise ConfigError(
            f"{option}={path}: its form is not known", "write data=NAME of a source (data_prep/sources/README.md)"
        )
    if form.source is None:
        raise ConfigError(f"{option}={path}: {form.what}; no source reads this as it is", form.fix)
    print(f"{option}={path}: {form.what}, read with {form.words}{form.fix and f'; {form.fix}'}", file=sys.stderr)
    data = replace(recipe.data, source=form.source, columns=replace(recipe.data.columns, **form.columns))
    return replace(recipe, data=data)


def other_form(path: Path, source: str) -> tuple[str, str] | None:
    """Return what a file is and what to write, if another source reads it or none does; None if nothing is known."""
    try:
        form = recognise(path)
    except DataError:
        return None
    read_alike = ("openai", "limi", "trajectory")
    if form is None or form.source == source or (form.source in read_alike and source in read_alike):
        return None
    return form.what, f"write {form.words}{form.fix and f'; {form.fix}'}" if form.source else form.fix


def _calls(found: list[Document]) -> Form | None:
    one = found[0]
    if "events" in one and any("data" in e for e in _objects(one["events"])):
        return Form("an event log of SII-CLI", "requests")
    if any(d.get("kind") == "call" for d in found) or ("request" in one and ("response" in one or "error" in one)):
        return Form("a log of recorded calls", "requests")
    if "response" in one and ("messages" in one or "input" in one):
        return Form("a log of recorded calls, as OpenHands writes it", "requests")
    return None


def _sessions(found: list[Document]) -> Form | None:
    said = [
        d for d in found if d.get("type") in ("user", "assistant", "tool_result") and isinstance(d.get("message"), dict)
    ]
    if any("parts" in d["message"] for d in said):
        return Form(
            "a session of Qwen Code, which has neither tools nor the system prompt",
            None,
            "run Qwen Code with --openai-logging, and read that folder with data=requests",
        )
    if said and all("uuid" in d for d in said):
        lacks = "write data.tools=FILE data.system=FILE, as a session has neither"
        return Form("a session of Claude Code", "claude_code", lacks)
    if any(d.get("type") in _CODEX and "payload" in d for d in found):
        return Form("a session of Codex, whose thoughts are encrypted and which has no tools", None, _LOG_INSTEAD)
    one = found[0]
    if any(isinstance(m, dict) and m.get("type") == "gemini" for m in _list(one.get("messages"))) or "$set" in one:
        return Form("a session of Gemini CLI, which has summaries of thoughts and no tools", None, _LOG_INSTEAD)
    return None


def _others(found: list[Document]) -> Form | None:
    return next((form for fits, form in _OTHERS if fits(found[0])), None)


_OTHERS: tuple[tuple[Callable[[Document], bool], Form], ...] = (
    (
        lambda d: str(d.get("schema_version", "")).startswith("ATIF"),
        Form("a trajectory in ATIF, whose texts a converter wrote", None, _LOG_INSTEAD),
    ),
    (
        lambda d: {"simulations", "info"} <= d.keys(),
        Form("results of tau2-bench, which have no tools in most versions", None, _LOG_INSTEAD),
    ),
    (
        lambda d: {"trajectory", "history"} <= d.keys() or any("message_type" in m for m in _objects(d.get("history"))),
        Form(
            "a trajectory of SWE-agent, which has no tools, and a history that is not what was sent", None, _LOG_INSTEAD
        ),
    ),
    (
        lambda d: str(d.get("trajectory_format", "")).startswith("mini-swe-agent") or {"info", "messages"} <= d.keys(),
        Form("a trajectory of mini-swe-agent, which has no tools", None, _LOG_INSTEAD),
    ),
    (
        lambda d: {"task_category", "trajectory"} <= d.keys(),
        Form("rows of CC-Bench, which have no tools and no system prompt", None, "take another set of trajectories"),
    ),
    (
        lambda d: {"instruction", "output"} <= d.keys(),
        Form(
            "rows of instruction and output",
            None,
            "write them as messages; text that no model said goes to unsupervised",
        ),
    ),
)


def _messages(found: list[Document]) -> Form | None:
    one = found[0]
    if one.keys() >= {"role", "content"} and all("role" in d for d in found):
        return Form("one conversation as a list of messages", None, 'write it as {"messages": […], "tools": […]}')
    named = [name for name, value in one.items() if _is_conversation(value)]
    tools = None if one.get("tools") or one.get("functions") else tools_column(one)
    columns = {"tools": tools} if tools else {}
    if "messages" in named or (isinstance(one.get("messages"), str) and '"role"' in one["messages"]):
        return Form("chat-completion messages", "openai", columns=columns)
    if len(named) == 1:
        return Form("chat-completion messages", "openai", columns={"messages": named[0], **columns})
    if any({"from", "value"} <= m.keys() for m in _list(one.get("conversations")) if isinstance(m, dict)):
        return Form("messages in ShareGPT's form", "openai", columns=columns)
    return None


def _is_conversation(value: Any) -> bool:
    return bool(_list(value)) and all(isinstance(m, dict) and m.get("role") in _ROLES for m in value)


def _objects(value: Any) -> list[Document]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


_TESTS: tuple[Callable[[list[Document]], Form | None], ...] = (_calls, _sessions, _others, _messages)
