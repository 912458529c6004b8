"""Assistant turns of a packed data set as prompts, and a server's answers to them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.pack.dataset import Dataset
from launch.serving.client import Client, all_at_once

SAMPLED = {"temperature": 0.6, "top_p": 0.95}  # as the model cards of Qwen3 and GLM-4.5 advise
GREEDY = {"temperature": 0.0}
WITHIN = "within twice the recorded length"
_LEAST_TOKENS, _LEAST_SHORT = 128, 64  # smallest token limits of `longest_answer` and of `Turn.most`

Calls = list[tuple[str, Any]]  # name and arguments


@dataclass(frozen=True, eq=False)
class Turn:
    """A supervised assistant turn in its conversation.

    index: its message's index in the conversation. tokens: the tokens of its packed sequence up to its stop token. begin: index
    of its own first token among them.
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
        """Return the token limit of an answer: twice the recorded turn or twice `usual`, whichever is longer."""
        return max(_LEAST_SHORT, 2 * len(self.said), 2 * usual)

    def request(self, tokens: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a chat completion request with this token limit."""
        return {
            "model": "default", "messages": self.conversation["messages"][: self.index],
            "tools": self.conversation["tools"] or None, "max_tokens": tokens, "skip_special_tokens": False, **sampling,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.conversation['id']}, message {self.index}"


@dataclass(frozen=True)
class Answer:
    """A server's answer to a turn's request. calls: arguments that are not JSON remain text."""

    turn: Turn
    finish_reason: str
    content: str = ""
    reasoning: str = ""
    calls: Calls = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)  # the prompt tokens that the server rendered

    @property
    def right(self) -> bool:
        """Whether the answer has exactly the trajectory's calls and ends with a stop token."""
        return self.stopped and self.calls == self.turn.expected

    @property
    def stopped(self) -> bool:
        return self.finish_reason in ("stop", "tool_calls")

    def __str__(self) -> str:
        said = self.calls or repr((self.content or self.reasoning)[:200])
        return f"{self.turn}: expected {self.turn.expected or self.turn.message['content'][:200]!r}, got {said} ({self.finish_reason})"


def turns(data: Dataset) -> Iterator[Turn]:
    """Yield all supervised turns.

    A prompt is read from the data set as trained on; it is not re-rendered. It ends before the turn's first supervised token, so that
    a mask at another place shows as another prompt; or before the turn's first token, if thinking or a part of the turn is context.
    """
    row = {place: n for n, place in enumerate(zip(data.ids, data.segments, strict=True))}
    thinking_is_context = data.manifest["inputs"]["options"]["thinking"] == "context"
    for conversation in data.conversations():
        for sequence in conversation["sequences"]:
            at = row[conversation["id"], sequence["segment"]]
            tokens = data.tokens(at)
            parted = conversation.get("unsupervised", {})
            found: dict[int, tuple[int, int]] = {}  # a turn has several spans if part of it is not learned
            for (index, prompt), (start, end) in zip(sequence["turns"], data.spans(at), strict=True):
                found[index] = (prompt if thinking_is_context or str(index) in parted else start), end
            for index, (begin, end) in found.items():
                yield Turn(conversation, index, tokens[:end], begin)


def spread(all_turns: Sequence[Turn], most: int) -> list[Turn]:
    """Return at most `most` turns, spread evenly over all."""
    if len(all_turns) <= most:
        return list(all_turns)
    return [all_turns[i * len(all_turns) // most] for i in range(most)]


def longest_answer(data: Dataset) -> int:
    """Return the token limit of an answer to any prompt: twice the longest recorded turn.

    A model that runs beyond it has lost its stop token.
    """
    return max(_LEAST_TOKENS, 2 * max(_lengths(data)))


def usual_answer(data: Dataset) -> int:
    """Return the 90th percentile of the recorded turns' lengths, in tokens."""
    return int(np.quantile(_lengths(data), 0.9, method="inverted_cdf"))


def _lengths(data: Dataset) -> list[int]:
    return [end - start for row in range(len(data.ids)) for start, end in data.spans(row)]


def ask(
    client: Client, asked: Sequence[Turn], usual: int, sampling: dict[str, float], progress: Callable[[], None]
) -> list[Answer]:
    """Request answers from the chat endpoint, several at a time, and return them in order. usual: of `usual_answer`."""

    def one(turn: Turn) -> Answer:
        body = turn.request(turn.most(usual), sampling) | {"return_prompt_token_ids": True}
        choice = client.post("/v1/chat/completions", body)["choices"][0]
        progress()
        return answer(turn, choice["message"], choice["finish_reason"], choice["prompt_token_ids"])

    return all_at_once(one, asked)


def answer(turn: Turn, message: dict[str, Any], finish_reason: str, prompt: Sequence[int] = ()) -> Answer:
    """Return the answer in a message of the chat endpoint, with surrounding white space stripped.

    SGLang leaves <think> in the thinking if a line break precedes it, as in GLM-4.5's output; it is removed here, as clients do.
    """
    words, thinking = ((message.get(key) or "").strip() for key in ("content", "reasoning_content"))
    calls = [(c["function"]["name"], parsed(c["function"]["arguments"])) for c in message.get("tool_calls") or []]
    return Answer(turn, finish_reason, words, thinking.removeprefix("<think>").strip(), calls, list(prompt))


def parsed(arguments: str) -> Any:
    """Return the arguments as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
