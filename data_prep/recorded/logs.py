"""Recorded calls on disk: a session file of this project, a folder with one JSON file a call, or an event log.

| on disk | a session is |
|---|---|
| JSON Lines of `{kind: call, dialect?, request, response, status?, complete?}` beside other kinds (`launch/agents/`) | a file |
| JSON Lines or a JSON array of `{request, response}` | a file |
| one JSON file a call: `{request, response}`, as Qwen Code writes with `--openai-logging` | a folder |
| one JSON file a call: `{messages, tools, response}`, as OpenHands writes with `log_completions` | a folder |
| `{id, events: [{data: {full_request, full_response}}]}`, SII-CLI's event log | a file |
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.recorded.call import Call, read_call
from data_prep.recorded.chains import conversations
from data_prep.records import Record, documents, files_of, parse
from data_prep.trajectory import Code, Rejected

CUT = "is cut in the middle, as a session that was killed leaves it"
_ANSWERED = ("response", "error")
_ENDINGS = re.compile(r"(\.jsonl?|\.ndjson)?(\.gz|\.zst)?$")


def session_records(path: Path) -> Iterator[Record]:
    """Yield one record a conversation, as JSON. A session that cannot be read becomes a record that is refused with the reason."""
    single: dict[Path, list[Path]] = {}  # by folder
    for file in files_of(path):
        if path.is_dir() and _is_call(file):
            single.setdefault(file.parent, []).append(file)
        else:
            yield from _Session(named(file, path), [file]).records()
    for folder, files in single.items():
        yield from _Session(str(folder.relative_to(path)) if folder != path else path.name, files).records()


def named(file: Path, path: Path) -> str:
    """Return the name of a session: its file below `data.path`, without its endings."""
    name = str(file.relative_to(path)) if path.is_dir() else file.name
    return _ENDINGS.sub("", name)


def parsed(file: Path, cut: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every document of a session's file; the value is a `Rejected` if it cannot be parsed.

    The place of a last line that `is CUT` is appended to `cut` instead, unless that line is the only one.
    """
    last: tuple[str, Rejected] | None = None
    for document in documents(file):
        if last is not None:
            yield last
            last = None
        try:
            yield document.place, parse(document.raw)
        except Rejected as error:
            if error.code is Code.json and document.place != "line 1" and not document.raw.endswith(b"\n"):
                last = document.place, error
            else:
                yield document.place, error
    if last is not None:
        cut.append(last[0])


def written(record: dict[str, Any], size: int) -> Record:
    """Return a record `{id, messages, tools, metadata, notes}` for `accept`. size: bytes read for it."""
    return Record(record["id"], json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"), size)


def refused(identity: str, size: int, error: Rejected) -> Record:
    """Return a record that `accept` refuses with this reason."""
    return written({"id": identity, "refused": [error.code.value, error.problem, error.fix]}, size)


def accept(record: dict[str, Any], repairs: list[str]) -> dict[str, Any]:
    """Return a record as the session's reader wrote it, and append its notes to `repairs`. Raise `Rejected` if it is refused."""
    if "refused" in record:
        code, problem, fix = record["refused"]
        raise Rejected(Code(code), problem, fix)
    repairs += record.pop("notes")
    return record


def _is_call(file: Path) -> bool:
    """Return whether a file holds exactly one call."""
    found = []
    for document in documents(file):
        found.append(document)
        if len(found) > 1:
            return False
    try:
        value = parse(found[0].raw) if found else None
    except Rejected:
        return False
    return isinstance(value, dict) and "events" not in value and "kind" not in value


class _Session:
    """One session: its calls in the order of its files, and what could not be read."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, files
        self.size = sum(file.stat().st_size for file in files)
        self.metadata: dict[str, Any] = {}
        self.notes: list[str] = []
        self.faults: Counter[tuple[Code, str, str]] = Counter()

    def records(self) -> Iterator[Record]:
        """Yield the session's conversations. If a call cannot be read, yield the session as one refused record: what the call said is
        missing from every later one."""
        try:
            found = conversations(self._calls())
        except Rejected as error:
            found = []
            self.faults[error.code, error.problem, error.fix] += not self.faults
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            found = []
            self.faults[Code.shape, f"it does not have the shape of a log: {error}", ""] += 1
        if self.faults:
            (code, problem, fix), _ = self.faults.most_common(1)[0]
            count = sum(self.faults.values())
            more = f" ({count} such calls)" if count > 1 else ""
            yield refused(self.name, self.size, Rejected(code, f"{problem}{more}", fix))
            return
        for number, record in enumerate(found):
            record["id"] = self.name if len(found) == 1 else f"{self.name}/{number + 1}"
            record["metadata"] |= {"session": self.name, **self.metadata}
            record["notes"] += self.notes if number == 0 else []
            yield written(record, self.size if number == 0 else 0)

    def _calls(self) -> Iterator[Call]:
        for file in self.files:
            for place, value in parsed(file, cut := list[str]()):
                where = file.name if len(self.files) > 1 else place
                try:
                    if isinstance(value, Rejected):
                        raise value
                    yield from self._of_document(value, where)
                except Rejected as error:
                    told = "" if error.problem.startswith(where) else f"{where}: "
                    self.faults[error.code, f"{told}{error.problem}", error.fix] += 1
            self.notes += [f"{place} {CUT}" for place in cut]

    def _of_document(self, value: Any, place: str) -> Iterator[Call]:
        if not isinstance(value, dict):
            raise Rejected(Code.shape, f"a recorded call is an object, this is {type(value).__name__}")
        if "events" in value:
            self.name = value["id"] if isinstance(value.get("id"), str) and value["id"] else self.name
            yield from _events(value["events"])
        elif value.get("kind", "call") != "call":
            if value["kind"] in ("start", "verdict"):
                self.metadata |= {k: v for k, v in value.items() if k not in ("kind", "time")}
        elif "request" in value and any(name in value for name in _ANSWERED):
            yield read_call(
                place, value["request"], value.get("response"), value.get("dialect"), value.get("complete", True), value.get("status")
            )  # fmt: skip
        elif "response" in value and ("messages" in value or "input" in value):
            options = value.get("kwargs") if isinstance(value.get("kwargs"), dict) else {}  # OpenHands' tools are there
            sent = {**(options or {}), **{k: v for k, v in value.items() if k != "response"}}
            yield read_call(place, sent, value["response"])
        else:
            raise Rejected(
                Code.shape,
                f"no recorded call: it has {', '.join(value) or 'nothing'}, and a call has request and response",
                "write data=auto to be told what the file is",
            )


def _events(events: Any) -> Iterator[Call]:
    """Yield the calls of an event log. An event without a request or an answer is telemetry."""
    if not isinstance(events, list):
        raise Rejected(Code.shape, f"events is {type(events).__name__}, not a list")
    sent, at, last = None, "", None
    for number, event in enumerate(events):
        data = event.get("data") if isinstance(event, dict) else None
        if not isinstance(data, dict):
            continue
        if data.get("full_request") is not None:
            if sent is not None:
                yield read_call(at, sent, None, "gemini")
            sent, at = data["full_request"], f"event {number}"
        answer = data["full_response"] if data.get("full_response") is not None else data.get("response")
        if answer is None:
            continue
        if sent is not None:
            yield read_call(at, sent, answer, "gemini")
            sent, last = None, answer
        elif answer != last:
            raise Rejected(
                Code.diverged,
                f"event {number}: the conversation does not continue with this answer, which has no request",
            )
    if sent is None and not at:
        raise Rejected(Code.shape, "no event holds a full_request with messages")
    if sent is not None:
        yield read_call(at, sent, None, "gemini")
