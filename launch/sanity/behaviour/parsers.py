"""Checks of the server's parsers on text that is known to be right: the data set's own turns."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch.checks import Check, share
from launch.sanity.behaviour.turns import Calls, Turn, answer, parsed, spread
from launch.serving.client import Client, all_at_once
from recipes.config import Family
from recipes.families import facts

_STREAMED = 8  # turns that are requested both whole and streamed


def gold(client: Client, turns: Sequence[Turn], family: Family, decode: Callable[[list[int]], str]) -> list[Check]:
    """Check the tool-call parser on recorded turns with calls, and the reasoning parser on recorded turns with thinking."""
    calling = [t for t in turns if t.expected]
    thinking = [t for t in turns if t.message.get("reasoning_content")]
    named = facts(family).parsers
    tools, reasoning = named.tool_calls, named.reasoning

    def wrong_calls(turn: Turn) -> str | None:
        body = {"text": _words(turn, decode), "tools": turn.conversation["tools"], "tool_call_parser": tools}
        read = client.post("/parse_function_call", body)["calls"]
        calls: Calls = [(c["name"], parsed(c["parameters"])) for c in read]
        return None if calls == turn.expected else f"{turn}: {turn.expected} is read as {calls}"

    def wrong_thinking(turn: Turn) -> str | None:
        body = {"text": decode(turn.said[:-1]), "reasoning_parser": reasoning}
        read = (client.post("/separate_reasoning", body)["reasoning_text"] or "").strip()
        thought = turn.message["reasoning_content"].strip()
        return None if read == thought else f"{turn}: thinking {thought[:80]!r} is read as {read[:80]!r}"

    return [
        _on_text("tool-call parser", "calls that a server does not see", calling, wrong_calls, tools),
        _on_text("reasoning parser", "thinking that a server treats as content", thinking, wrong_thinking, reasoning),
    ]


def _words(turn: Turn, decode: Callable[[list[int]], str]) -> str:
    """Return the turn's text after its thinking, without the stop token."""
    return decode(turn.said[:-1]).rpartition("</think>")[2]


def _on_text(
    name: str, protects_from: str, turns: Sequence[Turn], wrong: Callable[[Turn], str | None], parser: str
) -> Check:
    faults = [fault for fault in all_at_once(wrong, turns) if fault]
    return share(f"{name} {parser}", protects_from, len(turns) - len(faults), len(turns), 1, faults)


def streaming(client: Client, turns: Sequence[Turn], usual: int) -> Check:
    """Check that the chunks of a streamed greedy answer add up to the unstreamed answer.

    Requests are sent one at a time, because sums may differ with the batch size.

    turns: turns that the model answers correctly; parsers treat malformed calls differently in a stream and in a whole answer.
    usual: the 90th percentile of the recorded turns' tokens.
    """
    asked, faults = spread(turns, _STREAMED), []
    for turn in asked:
        body = turn.request(turn.most(usual), {"temperature": 0})
        choice = client.post("/v1/chat/completions", body)["choices"][0]
        whole = answer(turn, choice["message"], choice["finish_reason"])
        pieces = assembled(client.stream("/v1/chat/completions", body | {"stream": True}))
        streamed = answer(turn, *pieces)
        if whole != streamed:
            faults.append(f"whole: {whole}; in pieces: {streamed}")
    return share(
        "streaming", "clients that get another answer by streaming", len(asked) - len(faults), len(asked), 1, faults
    )


def assembled(chunks: Iterator[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return the message and the finish reason of a streamed chat completion."""
    texts = {"content": "", "reasoning_content": ""}
    calls: dict[int, dict[str, str]] = {}
    reason = ""
    for chunk in chunks:
        for choice in chunk["choices"]:  # empty in the chunk that counts tokens
            delta = choice["delta"]
            for key in texts:
                texts[key] += delta.get(key) or ""
            for piece in delta.get("tool_calls") or []:
                call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
                for key in call:
                    call[key] += piece["function"].get(key) or ""
            reason = choice.get("finish_reason") or reason
    return {**texts, "tool_calls": [{"function": calls[n]} for n in sorted(calls)]}, reason
