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
| a message that was cut, or that an earlier record has | context |
| an attachment `queued_command` | what the user said; other attachments are named |
| `toolUseResult`, summaries, snapshots | nothing: the model did not see them |
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.recorded import anthropic
from data_prep.recorded.logs import CUT, accept, named, parsed, refused, written
from data_prep.records import Record, files_of
from data_prep.trajectory import Code, Rejected

convert = accept
Line = dict[str, Any]
_KEPT = ("sessionId", "agentId", "cwd", "gitBranch", "version")
_SAID = ("user", "assistant", "attachment")
_SYNTHETIC = "<synthetic>"
_BY_ITSELF = "was said by Claude Code itself"


def records(path: Path) -> Iterator[Record]:
    """Yield one record a conversation of every session, as JSON."""
    for file in files_of(path):
        size = file.stat().st_size
        try:
            lines, notes = _lines(file)
            found = [*_conversations(named(file, path), lines)]
        except Rejected as error:
            yield refused(named(file, path), size, error)
            continue
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            yield refused(
                named(file, path), size, Rejected(Code.shape, f"it does not have the shape of a session: {error}")
            )
            continue
        if found:
            found[0]["notes"] += notes
        for number, record in enumerate(found):
            yield written(record, size if number == 0 else 0)


def _lines(file: Path) -> tuple[list[Line], list[str]]:
    """Return the lines of a session, and a note if its last one is cut in the middle."""
    lines: list[Line] = []
    cut: list[str] = []
    for place, value in parsed(file, cut):
        if isinstance(value, Rejected):
            raise Rejected(value.code, f"{place}: {value.problem}", value.fix)
        if isinstance(value, dict):
            lines.append(value)
    return lines, [f"the last line {CUT}"] if cut else []


def _conversations(name: str, lines: list[Line]) -> Iterator[dict[str, Any]]:
    by_uuid = {line["uuid"]: line for line in lines if isinstance(line.get("uuid"), str)}
    said = [line for line in by_uuid.values() if line.get("type") in _SAID]
    if not all(isinstance(line.get("message"), dict) for line in said if line["type"] != "attachment"):
        raise Rejected(Code.shape, "a line of type user or assistant has no message")
    roots: dict[str, str] = {}
    for uuid, line in by_uuid.items():
        parent = str(line.get("parentUuid"))
        roots[uuid] = roots[parent] if parent in roots else str(_upwards(line, by_uuid)[-1]["uuid"])
    trees: dict[str, list[Line]] = {}
    for line in said:
        trees.setdefault(roots[line["uuid"]], []).append(line)
    if not trees:
        raise Rejected(Code.shape, "no line of a conversation", "write data=auto to be told what the file is")
    found, learned = [], set[str]()
    for tree in trees.values():
        leaf = tree[-1]  # the conversation that was said last; others of its tree were abandoned
        if record := _record(_whole(_branch(leaf, by_uuid), _Beside(tree)), tree, learned):
            found.append((leaf, record))
    count = {True: 0, False: 0}
    for leaf, record in found:
        agent = bool(leaf.get("isSidechain"))
        count[agent] += 1
        several = sum(bool(other.get("isSidechain")) is agent for other, _ in found) > 1
        number = str(count[agent]) if several else ""
        part = str(leaf.get("agentId") or f"agent{number}") if agent else number
        record["metadata"] |= {k: leaf[k] for k in _KEPT if leaf.get(k)} | ({"sidechain": True} if agent else {})
        yield {"id": "/".join(filter(None, (str(leaf.get("sessionId") or name), part))), **record}


def _branch(leaf: Line, by_uuid: dict[str, Line]) -> list[Line]:
    return [line for line in reversed(_upwards(leaf, by_uuid)) if line.get("type") in _SAID]


def _upwards(line: Line, by_uuid: dict[str, Line]) -> list[Line]:
    """Return the line, its parent, and so on up to a line without one."""
    path, seen = [line], {line["uuid"]}
    while (parent := path[-1].get("parentUuid")) in by_uuid and parent not in seen:
        path.append(by_uuid[parent])
        seen.add(parent)
    return path


class _Beside:
    """Lines of one tree by what belongs to them: the blocks of one message, and the results of its calls.

    They can hang beside the branch, because calls of one message are answered one by one.
    """

    def __init__(self, tree: list[Line]) -> None:
        self._of_message: dict[tuple[str, int], list[Line]] = {}
        # Of a line: how often a user spoke before it, as some servers give every message one id.
        self._stretch: dict[str, int] = {}
        self.of_call: dict[str, list[Line]] = {}
        spoken = 0
        for line in tree:
            answers = [b["tool_use_id"] for b in _blocks(line) if isinstance(b.get("tool_use_id"), str)]
            spoken += line["type"] == "user" and not answers
            self._stretch[line["uuid"]] = spoken
            if line["type"] == "assistant" and (identity := _identity(line)):
                self._of_message.setdefault((identity, spoken), []).append(line)
            for call in answers:
                self.of_call.setdefault(call, []).append(line)

    def message(self, line: Line) -> list[Line]:
        """Return the lines of the message that a line belongs to."""
        return self._of_message.get((_identity(line), self._stretch[line["uuid"]]), [line])


def _identity(line: Line) -> str:
    identity = line["message"].get("id")
    return identity if isinstance(identity, str) else ""


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
        if line["type"] != "assistant":
            take([line])
            continue
        take(beside.message(line))
        calls = [b.get("id") for part in messages[-1] for b in _blocks(part) if b.get("type") == "tool_use"]
        for call in calls:
            for result in beside.of_call.get(str(call), []):
                if result["uuid"] not in done:
                    take([result])
    return messages


def _blocks(line: Line) -> list[dict[str, Any]]:
    content = (line.get("message") or {}).get("content")
    return [b for b in content if isinstance(b, dict)] if isinstance(content, list) else []


def _record(messages: list[list[Line]], tree: list[Line], learned: set[str]) -> dict[str, Any] | None:
    """Return `{messages, tools, metadata, notes}`; None if no model said anything.

    learned: ids of messages of earlier records; those of this one are added.
    """
    notes: list[str] = []
    out: list[dict[str, Any]] = []
    models: dict[str, None] = {}
    attached: Counter[str] = Counter()
    errors = 0
    own: set[str] = set()
    for group in messages:
        first, place = group[0], f"message {len(out)}"
        if first["type"] == "attachment":
            said = first.get("attachment") if isinstance(first.get("attachment"), dict) else {}
            if said and said.get("type") == "queued_command" and isinstance(said.get("prompt"), str):
                out.append({"role": "user", "content": said["prompt"]})
            else:
                attached[str((said or {}).get("type"))] += 1
            continue
        if first.get("isApiErrorMessage"):
            errors += 1
            continue
        chat, found = _chat(group, place)
        notes += found
        if first["type"] == "assistant":
            why = _not_learned(group, learned)
            if why != _BY_ITSELF:
                models[str(first["message"].get("model"))] = None
                own |= {_identity(first)}
            if why:
                chat = [{**m, "weight": 0} for m in chat]
                notes.append(f"{place} {why}: shown, not learned")
        out += chat
    learned |= own - {""}
    if not models:
        return None
    if errors:
        notes.append(f"{errors} errors of the API left out")
    if attached:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in attached.items())
        notes.append(f"attachments that the model may have seen are not shown: {kinds}")
    used = {line["uuid"] for group in messages for line in group}
    if others := sum(line["uuid"] not in used and line.get("parentUuid") in used for line in tree):
        notes.append(f"{others} other branches left out")
    return {"messages": out, "tools": [], "metadata": {"models": [*models]}, "notes": notes}


def _chat(group: list[Line], place: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of one message as chat messages, and what could not be taken as it is."""
    first, found = group[0], list[str]()
    content = first["message"].get("content")
    if len(group) > 1:
        content = [b for line in group for b in _blocks(line)]
    try:
        chat = anthropic.chat_messages(first["type"], content, found)
    except Rejected as error:
        raise Rejected(error.code, f"{place}: {error.problem}", error.fix) from error
    return chat, [f"{place}: {note}" for note in found]


def _not_learned(group: list[Line], learned: set[str]) -> str | None:
    """Return why a turn is not learned, or None."""
    first = group[0]
    if first["message"].get("model") == _SYNTHETIC:
        return _BY_ITSELF
    if _identity(first) in learned:
        return "is learned in an earlier record of the session"
    # Lines of a message's earlier blocks have no reason yet.
    reasons = [reason for line in group if (reason := line["message"].get("stop_reason")) is not None]
    if reasons and reasons[-1] not in anthropic.WHOLE:
        return f"ended with stop_reason {reasons[-1]!r}"
    return None
