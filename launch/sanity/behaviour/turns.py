"""Assistant turns of a packed data set as prompts, and the server's answers to them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.pack.dataset import Dataset
from launch.serving.client import Client, all_at_once

SAMPLED = {"temperature": 0.6, "top_p": 0.95}  # what the model cards of Qwen3 and GLM-4.5 advise
GREEDY = {"temperature": 0.0}
WITHIN = "within twice the recorded length"
_LEAST_TOKENS, _LEAST_SHORT = 128, 64

Calls = list[tuple[str, Any]]  # name and arguments


@dataclass(frozen=True, eq=False)
class Turn:
    """A supervised assistant turn in its conversation.

    index: of its message. tokens: of its sequence up to its stop token, as they lie in the data set. begin: of its own among them.
    """

    conversation: dict[str, Any]
    index: int
    tokens: np.ndarray
    begin: int

    @property
    def prompt(self) -> list[int]:
        return list(self.tokens[: self.begin].tolist())

    @property
    def said(self) -> list[int]:
        return list(self.tokens[self.begin :].tolist())

    @property
    def message(self) -> dict[str, Any]:
        return dict(self.conversation["messages"][self.index])

    @property
    def expected(self) -> Calls:
        return [(c["function"]["name"], c["function"]["arguments"]) for c in self.message.get("tool_calls", [])]

    def most(self, usual: int) -> int:
        """Tokens that an answer may have: twice as many as the recorded one or as nine of ten, whichever is longer."""
        return max(_LEAST_SHORT, 2 * len(self.said), 2 * usual)

    def request(self, tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """The body of a chat completion of at most that many tokens."""
        return {
            "model": "default", "messages": self.conversation["messages"][: self.index],
            "tools": self.conversation["tools"] or None, "max_tokens": tokens, "skip_special_tokens": False, **sampling,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.conversation['id']}, message {self.index}"


@dataclass(frozen=True)
class Answer:
    """What came back to a turn's request. calls: an argument text that is no JSON stays a text."""

    turn: Turn
    finish_reason: str
    content: str = ""
    reasoning: str = ""
    calls: Calls = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)  # the tokens that the server made of the request

    @property
    def right(self) -> bool:
        """Exactly the trajectory's calls, ended by the stop token."""
        return self.stopped and self.calls == self.turn.expected

    @property
    def stopped(self) -> bool:
        return self.finish_reason in ("stop", "tool_calls")

    def __str__(self) -> str:
        said = self.calls or repr((self.content or self.reasoning)[:200])
        return f"{self.turn}: expected {self.turn.expected or self.turn.message['content'][:200]!r}, got {said} ({self.finish_reason})"


def turns(data: Dataset) -> Iterator[Turn]:
    """All supervised turns. The prompt is read from the data set as it was trained on, not rendered again: everything before the
    first supervised token, or before the thinking that is shown without being supervised."""
    row = {place: n for n, place in enumerate(zip(data.ids, data.segments, strict=True))}
    thinking_is_context = data.manifest["inputs"]["options"]["thinking"] == "context"
    for conversation in data.conversations():
        for sequence in conversation["sequences"]:
            at = row[conversation["id"], sequence["segment"]]
            tokens = data.tokens(at)
            for (index, prompt), (start, end) in zip(sequence["turns"], data.spans(at), strict=True):
                yield Turn(conversation, index, tokens[:end], prompt if thinking_is_context else start)


def spread(all_turns: Sequence[Turn], most: int) -> list[Turn]:
    """At most that many, evenly over all."""
    if len(all_turns) <= most:
        return list(all_turns)
    return [all_turns[i * len(all_turns) // most] for i in range(most)]


def longest_answer(data: Dataset) -> int:
    """Tokens that an answer to any prompt may have: twice the longest recorded turn. One who goes on has lost its stop token."""
    return max(_LEAST_TOKENS, 2 * max(_lengths(data)))


def usual_answer(data: Dataset) -> int:
    """Tokens that nine of ten recorded turns have at most."""
    return int(np.quantile(_lengths(data), 0.9, method="inverted_cdf"))


def _lengths(data: Dataset) -> list[int]:
    return [end - start for row in range(len(data.ids)) for start, end in data.spans(row)]


def ask(
    client: Client, asked: Sequence[Turn], usual: int, sampling: dict[str, float], progress: Callable[[], None]
) -> list[Answer]:
    """Answers through the chat endpoint, several at a time, in order; usual: tokens of nine of ten recorded turns."""

    def one(turn: Turn) -> Answer:
        body = turn.request(turn.most(usual), sampling) | {"return_prompt_token_ids": True}
        choice = client.post("/v1/chat/completions", body)["choices"][0]
        progress()
        return answer(turn, choice["message"], choice["finish_reason"], choice["prompt_token_ids"])

    return all_at_once(one, asked)


def answer(turn: Turn, message: dict[str, Any], finish_reason: str, prompt: Sequence[int] = ()) -> Answer:
    """Of the chat endpoint's message, words without the space around them.

    SGLang leaves the opening mark in the thinking where a line break comes before it, as GLM-4.5 writes it; clients take it off.
    """
    words, thinking = ((message.get(key) or "").strip() for key in ("content", "reasoning_content"))
    calls = [(c["function"]["name"], parsed(c["function"]["arguments"])) for c in message.get("tool_calls") or []]
    return Answer(turn, finish_reason, words, thinking.removeprefix("<think>").strip(), calls, list(prompt))


def parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
