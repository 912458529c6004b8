"""Source `claude_code`: sessions of Claude Code, `~/.claude/projects/*/*.jsonl`; `data.path` is a file or a folder.

A session has neither the system prompt nor the tools that were sent: `data.system=FILE data.tools=FILE` give them.

| in a session | becomes |
|---|---|
| lines `user` and `assistant`, a tree by `parentUuid` | the branch of the last leaf; other branches are named |
| blocks of one message, one a line | one message |
| `tool_result` blocks | results, after the calls that they answer |
| a line without a parent after the first, such as the summary after a compaction | the start of a record of its own |
| a sub-agent (`isSidechain`), in the file or in one of its own | a record of its own |
| lines of a model that is not one (`<synthetic>`) | left out if an API's error, else context |
| `toolUseResult`, summaries, snapshots | nothing: the model did not see them |
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.recorded import anthropic
from data_prep.recorded.logs import accept, refused, written
from data_prep.records import Record, files_of, json_records, parse
from data_prep.trajectory import Code, Rejected

convert = accept
Line = dict[str, Any]
_KEPT = ("sessionId", "agentId", "cwd", "gitBranch", "version")
_SYNTHETIC = "<synthetic>"


def records(path: Path) -> Iterator[Record]:
    """Yield one record a conversation of every session, as JSON."""
    for file in files_of(path):
        size = file.stat().st_size
        try:
            lines, notes = _lines(file)
            found = [*_conversations(file.stem, lines)]
        except Rejected as error:
            yield refused(file.stem, size, error)
            continue
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            yield refused(file.stem, size, Rejected(Code.shape, f"it does not have the shape of a session: {error}"))
            continue
        if found:
            found[0]["notes"] += notes
        for number, record in enumerate(found):
            yield written(record, size if number == 0 else 0)


def _lines(file: Path) -> tuple[list[Line], list[str]]:
    """Return the lines of a session, and a note if its last one is cut in the middle."""
    lines: list[Line] = []
    broken: Rejected | None = None
    for record in json_records(file):
        if broken is not None:
            raise broken
        try:
            line = parse(record.raw)
        except Rejected as error:
            broken = Rejected(error.code, f"{record.place}: {error.problem}", error.fix)
            if record.raw.endswith(b"\n"):
                raise broken from error
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, ["the last line is cut in the middle, as a session that was killed leaves it"] if broken else []


def _conversations(name: str, lines: list[Line]) -> Iterator[dict[str, Any]]:
    by_uuid = {line["uuid"]: line for line in lines if isinstance(line.get("uuid"), str)}
    said = [line for line in by_uuid.values() if line.get("type") in ("user", "assistant")]
    if not all(isinstance(line.get("message"), dict) for line in said):
        raise Rejected(Code.shape, "a line of type user or assistant has no message")
    leaves: dict[str, Line] = {}  # the last line of the tree that begins at a root
    roots: dict[str, str] = {}
    for uuid, line in by_uuid.items():
        parent = str(line.get("parentUuid"))
        roots[uuid] = roots[parent] if parent in roots else str(_upwards(line, by_uuid)[-1]["uuid"])
    for line in said:
        leaves[roots[line["uuid"]]] = line
    if not leaves:
        raise Rejected(Code.shape, "no line of a conversation", "write data=auto to be told what the file is")
    beside = _Beside(said)
    found = [
        (leaf, record) for leaf in leaves.values() if (record := _record(_whole(_branch(leaf, by_uuid), beside), said))
    ]
    count = {True: 0, False: 0}
    for leaf, record in found:
        agent = bool(leaf.get("isSidechain"))
        count[agent] += 1
        several = sum(bool(other.get("isSidechain")) is agent for other, _ in found) > 1
        number = str(count[agent]) if several else ""
        part = str(leaf.get("agentId") or f"agent{number}") if agent else number
        record["metadata"] |= {k: leaf[k] for k in _KEPT if leaf.get(k)}
        yield {"id": "/".join(filter(None, (str(leaf.get("sessionId") or name), part))), **record}


def _branch(leaf: Line, by_uuid: dict[str, Line]) -> list[Line]:
    return [line for line in reversed(_upwards(leaf, by_uuid)) if line.get("type") in ("user", "assistant")]


def _upwards(line: Line, by_uuid: dict[str, Line]) -> list[Line]:
    """Return the line, its parent, and so on up to a line without one."""
    path, seen = [line], {line["uuid"]}
    while (parent := path[-1].get("parentUuid")) in by_uuid and parent not in seen:
        path.append(by_uuid[parent])
        seen.add(parent)
    return path


class _Beside:
    """Lines by what belongs to them: the blocks of one message, and the results of its calls. They can hang beside the branch, because
    calls of one message are answered one by one."""

    def __init__(self, said: list[Line]) -> None:
        self.of_message: dict[str, list[Line]] = {}
        self.of_call: dict[str, list[Line]] = {}
        for line in said:
            if line["type"] == "assistant" and isinstance(identity := line["message"].get("id"), str):
                self.of_message.setdefault(identity, []).append(line)
            for block in _blocks(line):
                if isinstance(answers := block.get("tool_use_id"), str):
                    self.of_call.setdefault(answers, []).append(line)


def _whole(branch: list[Line], beside: _Beside) -> list[list[Line]]:
    """Return the branch's messages, each as its lines."""
    messages: list[list[Line]] = []
    done: set[str] = set()

    def take(lines: list[Line]) -> None:
        messages.append(lines)
        done.update(line["uuid"] for line in lines)

    for line in branch:
        if line["uuid"] in done:
            continue
        if line["type"] == "user":
            take([line])
            continue
        take(beside.of_message.get(str(line["message"].get("id")), [line]))
        calls = [b.get("id") for part in messages[-1] for b in _blocks(part) if b.get("type") == "tool_use"]
        for call in calls:
            for result in beside.of_call.get(str(call), []):
                if result["uuid"] not in done:
                    take([result])
    return messages


def _blocks(line: Line) -> list[dict[str, Any]]:
    content = line["message"].get("content")
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def _record(messages: list[list[Line]], said: list[Line]) -> dict[str, Any] | None:
    """Return `{messages, tools, metadata, notes}`; None if no model said anything."""
    notes: list[str] = []
    out: list[dict[str, Any]] = []
    models: dict[str, None] = {}
    errors = 0
    for group in messages:
        first = group[0]
        if first.get("isApiErrorMessage"):
            errors += 1
            continue
        content = first["message"].get("content")
        if len(group) > 1:
            content = [b for line in group for b in _blocks(line)]
        place = f"message {len(out)}"
        found: list[str] = []
        try:
            chat = anthropic.chat_messages(first["type"], content, found)
        except Rejected as error:
            raise Rejected(error.code, f"{place}: {error.problem}", error.fix) from error
        notes += [f"{place}: {note}" for note in found]
        if first["type"] == "assistant" and first["message"].get("model") == _SYNTHETIC:
            chat = [{**m, "weight": 0} for m in chat]
            notes.append(f"{place} was said by Claude Code itself: shown, not learned")
        elif first["type"] == "assistant":
            models[str(first["message"].get("model"))] = None
        out += chat
    if not models:
        return None
    if errors:
        notes.append(f"{errors} errors of the API left out")
    used = {line["uuid"] for group in messages for line in group}
    tree = {line["uuid"] for line in said if line["uuid"] not in used and line.get("parentUuid") in used}
    if tree:
        notes.append(f"{len(tree)} other branches left out")
    return {"messages": out, "tools": [], "metadata": {"models": [*models]}, "notes": notes}
