"""Conversations of a session: recorded calls grouped into chains, in each of which a call extends the one before it.

A call extends another one if it has the same tools, and its messages are those of the other, the other's answer, and more. Two
messages are the same if their role, their text without surrounding white space, and their calls are. Ids do not count, nor does
reasoning, which most clients do not send back. A call that extends none begins a chain: a sub-agent, a side call, a history that was
compacted or changed.

A turn of the history that no answer of its chain holds is context (`weight: 0`): the client wrote it, or it is learned in another
chain.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.recorded.call import Call
from data_prep.trajectory import Code, Rejected

_SHOWN = 60  # characters of a side call's question in a note
_SAME_ROLE = {"developer": "system", "function": "tool"}


@dataclass
class _Chain:
    """One conversation so far. sent: keys of the last request's messages. said: recorded answers by their place in the history."""

    tools: list[dict[str, Any]]
    tools_key: str
    messages: list[dict[str, Any]]
    sent: list[str]
    answer: dict[str, Any] | None = None
    unfinished: str | None = None
    said: dict[int, tuple[dict[str, Any], bool]] = field(default_factory=dict)  # answer, and whether it is whole
    calls: list[str] = field(default_factory=list)  # their places
    first: int = 0  # numbers of its first and its last call in the session
    last: int = 0
    notes: list[str] = field(default_factory=list)

    def extended_by(self, tools_key: str, sent: list[str]) -> bool:
        """Return whether a request with these tools and messages goes on after this chain's last answer."""
        end = len(self.sent)
        if tools_key != self.tools_key or sent[:end] != self.sent or len(sent) <= end:
            return False
        return self.answer is None or sent[end] == key(self.answer)

    def take(self, call: Call, sent: list[str]) -> None:
        """Add a call that extends this chain or repeats its last one."""
        if self.calls and sent == self.sent:
            better = call.answer.message is not None and (
                self.answer is None or self.unfinished or not call.answer.unfinished
            )
            taken = "the later answer is taken" if better else "the earlier answer is kept"
            self.notes.append(f"{call.place} repeats {self.calls[-1]}, a retry: {taken}")
            if not better:
                self.calls.append(call.place)
                return
        elif self.answer is not None:
            self.said[len(self.sent)] = self.answer, self.unfinished is None
        self.messages, self.sent = call.request.messages, sent
        self.answer, self.unfinished = call.answer.message, call.answer.unfinished
        self.calls.append(call.place)
        self.notes += [f"{call.place}: {note}" for note in dict.fromkeys(call.notes)]
        if self.unfinished:
            self.notes.append(f"{call.place}: {self.unfinished}: shown, not learned")

    def begins_as(self, other: "_Chain") -> bool:
        """Return whether both have the same first message that is no system message."""
        own, others = (next((k for k in c.sent if not k.startswith('["system"')), None) for c in (self, other))
        return own == others

    @property
    def acts(self) -> bool:
        """Whether its last answer calls a tool, or it has several answers."""
        return len(self.calls) > 1 or bool((self.answer or {}).get("tool_calls"))


def conversations(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """Return the records of a session's calls: `{messages, tools, metadata, notes}` each.

    Raise `Rejected` if no call has an answer.
    """
    chains: list[_Chain] = []
    for number, call in enumerate(calls):
        sent = [key(m) for m in call.request.messages]
        tools_key = json.dumps(call.request.tools, sort_keys=True)
        extended = [c for c in chains if c.extended_by(tools_key, sent)]
        extended += [c for c in chains if c.tools_key == tools_key and c.sent == sent]
        if not extended:
            chains.append(_Chain(call.request.tools, tools_key, [], [], first=number))
            extended = chains[-1:]
        chain = max(extended, key=lambda c: len(c.sent))
        chain.take(call, sent)
        chain.last = number
    answered = [c for c in chains if c.answer is not None or c.said]
    if not answered:
        raise Rejected(
            Code.no_supervised, f"none of its {sum(len(c.calls) for c in chains)} recorded calls has an answer"
        )
    return [_record(chain, chains) for chain in _without_side_calls(answered)]


def _without_side_calls(chains: list[_Chain]) -> list[_Chain]:
    """Leave out the single questions that a client asks beside its conversation, such as for a title: without its tools, or while it
    goes on. The longest chain names them."""
    main = max(chains, key=lambda c: len(c.calls))
    sides = [
        c
        for c in chains
        if main.acts
        and not (c.acts or c.begins_as(main))
        and (main.first < c.first < main.last or (main.tools and not c.tools))
    ]
    for side in sides:
        asked = next((_text(m) for m in reversed(side.messages) if m.get("role") == "user"), "")
        main.notes.append(f"{side.calls[0]}, a side call, is left out: {asked[:_SHOWN]!r}")
    return [c for c in chains if c not in sides]


def _record(chain: _Chain, chains: list[_Chain]) -> dict[str, Any]:
    notes, messages = [*chain.notes], list[dict[str, Any]]()
    unsaid: list[int] = []
    elsewhere: list[int] = []
    unsent: list[int] = []
    others = {key(answer) for c in chains if c is not chain for answer in _answers(c)}
    for place, message in enumerate(chain.messages):
        if place in chain.said:
            answer, whole = chain.said[place]
            # The results name the ids of these calls, not of those in the answer.
            calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
            messages.append({**answer, **calls, **({} if whole else {"weight": 0})})
            if answer.get("reasoning_content") and not any(message.get(n) for n in ("reasoning_content", "reasoning")):
                unsent.append(place)
        elif message.get("role") == "assistant":
            messages.append({**message, "weight": 0})
            (elsewhere if key(message) in others else unsaid).append(place)
        else:
            messages.append(message)
    if chain.answer is not None:
        messages.append({**chain.answer, **({"weight": 0} if chain.unfinished else {})})
    if unsaid:
        notes.append(f"said by no recorded answer, so shown and not learned: {_list(unsaid)}")
    if elsewhere:
        notes.append(f"learned in another conversation of the session, so shown alone: {_list(elsewhere)}")
    if unsent:
        notes.append(f"with the reasoning of the answer, which the client did not send back: {_list(unsent)}")
    metadata = {"calls": len(chain.calls)}
    return {"messages": messages, "tools": chain.tools, "metadata": metadata, "notes": notes}


def _answers(chain: _Chain) -> list[dict[str, Any]]:
    """Return the recorded answers of a chain."""
    return [answer for answer, _ in chain.said.values()] + ([chain.answer] if chain.answer else [])


def key(message: dict[str, Any]) -> str:
    """Return what makes a message the same as another one, as text."""
    role = str(message.get("role"))
    calls = [
        (function.get("name"), _arguments(function.get("arguments")))
        for call in message.get("tool_calls") or []
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict)
    ]
    return json.dumps([_SAME_ROLE.get(role, role), _text(message).strip(), calls], sort_keys=True)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(p.get("text") or "") if isinstance(p, dict) else str(p) for p in content)
    return content if isinstance(content, str) else "" if content is None else json.dumps(content, sort_keys=True)


def _arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _list(places: list[int]) -> str:
    shown = ", ".join(map(str, places[:5])) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
    return f"message{'s' * (len(places) > 1)} {shown}"
