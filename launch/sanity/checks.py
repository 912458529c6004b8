"""What the server must show of a trained checkpoint. A check has a name, a figure, a limit, and an outcome."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jsonschema import Draft202012Validator

from data_prep.dataset import Dataset
from launch.sanity.server import Server

MAX_NEW_TOKENS = 256
AT_ONCE = 16  # requests in flight


class Outcome(StrEnum):
    """warned: odd, and right in some runs; it is shown and ends nothing."""

    passed = "pass"
    warned = "warn"
    failed = "fail"


def judged(passed: bool) -> Outcome:
    return Outcome.passed if passed else Outcome.failed


@dataclass(frozen=True)
class Check:
    """protects_from: what goes wrong in the field where this fails. detail: what was seen, a few lines at most."""

    name: str
    protects_from: str
    figure: str
    limit: str
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True)
class Turn:
    """One assistant turn that calls tools, in a conversation of the data set."""

    conversation: dict[str, Any]
    index: int  # of the message
    prompt_tokens: list[int]  # of the packed data set: everything before the turn

    @property
    def expected(self) -> list[tuple[str, Any]]:
        calls = self.conversation["messages"][self.index]["tool_calls"]
        return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]

    def __str__(self) -> str:
        return f"{self.conversation['id']}, message {self.index}"


@dataclass
class Answer:
    """The server's greedy answer to a turn's prompt."""

    turn: Turn
    prompt_tokens: list[int]
    finish_reason: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    content: str = ""

    @property
    def right(self) -> bool:
        """Exactly the trajectory's calls, ended by the stop token."""
        return self.finish_reason == "tool_calls" and self.calls == self.turn.expected


def turns(data: Dataset) -> Iterator[Turn]:
    """All supervised turns with calls. The prompt is read from the data set as it was trained on, not rendered again:
    everything before the first supervised token, or before the thinking that is shown without being supervised."""
    row = {place: n for n, place in enumerate(zip(data.ids, data.segments, strict=True))}
    thinking_is_context = data.manifest["inputs"]["options"]["thinking"] == "context"
    for conversation in data.conversations():
        for sequence in conversation["sequences"]:
            at = row[conversation["id"], sequence["segment"]]
            for (index, prompt), (start, _) in zip(sequence["turns"], data.spans(at), strict=True):
                if "tool_calls" in conversation["messages"][index]:
                    tokens = data.tokens(at)[: prompt if thinking_is_context else start]
                    yield Turn(conversation, index, tokens.tolist())


def ask(server: Server, asked: list[Turn], progress: Callable[[], None]) -> list[Answer]:
    """Greedy answers through the chat endpoint, several at a time, in order."""

    def one(turn: Turn) -> Answer:
        answer = server.post(
            "/v1/chat/completions",
            {
                "model": "default",
                "messages": turn.conversation["messages"][: turn.index],
                "tools": turn.conversation["tools"],
                "temperature": 0,
                "max_tokens": MAX_NEW_TOKENS,
                "return_prompt_token_ids": True,
            },
        )
        choice = answer["choices"][0]
        message = choice["message"]
        calls = [(c["function"]["name"], _parsed(c["function"]["arguments"])) for c in message.get("tool_calls") or []]
        progress()
        return Answer(turn, choice["prompt_token_ids"], choice["finish_reason"], calls, message.get("content") or "")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, asked))


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def served(server: Server, architecture: str) -> Check:
    info = server.get("/model_info")
    found = (info.get("architectures") or ["?"])[0]
    version = server.get("/server_info").get("version", "?")
    return Check(
        "served",
        "a checkpoint that no server loads",
        f"{found}, SGLang {version}",
        architecture,
        judged(found == architecture),
    )


def template_parity(answers: list[Answer], decode: Callable[[list[int]], str]) -> Check:
    """The prompt the server makes of messages and tools, against the tokens that were trained on."""
    differing = [a for a in answers if a.prompt_tokens != a.turn.prompt_tokens]
    detail = ""
    if differing:
        a = differing[0]
        mine, theirs = a.turn.prompt_tokens, a.prompt_tokens
        at = next(
            (i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs))
        )
        detail = (
            f"{a.turn}, token {at}: trained on {decode(mine[at : at + 8])!r} "
            f"({len(mine)} tokens), the server sends {decode(theirs[at : at + 8])!r} ({len(theirs)} tokens)"
        )
    return Check(
        "chat template", "prompts at inference that differ from the training text",
        f"{len(answers) - len(differing)} of {len(answers)} prompts equal", "all", judged(not differing), detail,
    )  # fmt: skip


def heldout_nll(server: Server, data: Dataset, trained: float, tolerance: float) -> Check:
    """Mean loss a supervised token of the held-out sequences, by the server, against the trainer's own."""
    total, count = 0.0, 0
    for sequence in range(len(data.ids)):
        # logprob_start_len k gives an empty first entry and then tokens k+1...: from 0, token i is entry i.
        answer = server.post(
            "/generate",
            {"input_ids": data.tokens(sequence).tolist(), "sampling_params": {"temperature": 0, "max_new_tokens": 0},
             "return_logprob": True, "logprob_start_len": 0},
        )  # fmt: skip
        entries = answer["meta_info"]["input_token_logprobs"]
        for start, end in data.spans(sequence):
            total -= sum(math.nan if logprob is None else logprob for logprob, _, _ in entries[start:end])
            count += end - start
    nll = total / count
    return Check(
        "held-out loss", "weights that serve otherwise than they trained",
        f"{nll:.6f} by the server, {trained:.6f} by the trainer", f"within {tolerance:g}",
        judged(abs(nll - trained) <= tolerance),
    )  # fmt: skip


def right_calls(name: str, answers: list[Answer], least: float | None) -> Check:
    """Share of prompts answered with exactly the trajectory's calls; only shown where `least` is None."""
    right = sum(a.right for a in answers)
    wrong = next((a for a in answers if not a.right), None)
    detail = "" if wrong is None or least is None or right / len(answers) >= least else _shown(wrong)
    return Check(
        name, "an agent that does not act",
        f"{right} of {len(answers)} ({right / len(answers):.0%})", "shown" if least is None else f"at least {least:.0%}",
        judged(least is None or right / len(answers) >= least), detail,
    )  # fmt: skip


def _shown(a: Answer) -> str:
    return f"{a.turn}: expected {a.turn.expected}, got {a.calls or repr(a.content[:200])} ({a.finish_reason})"


def valid_calls(answers: list[Answer]) -> Check:
    """Calls name a known tool, and their arguments parse and match its schema."""
    seen, faults = 0, []
    for a in answers:
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in a.turn.conversation["tools"]}
        for name, arguments in a.calls:
            seen += 1
            if name not in schemas or not isinstance(arguments, dict):
                faults.append(f"{name}({arguments!r})")
            elif error := next(Draft202012Validator(schemas[name]).iter_errors(arguments), None):
                faults.append(f"{name}: {error.message}")
    # Held-out prompts are not learned: a wrong call there is shown, one in twenty is the limit.
    return Check(
        "calls match their schema", "calls that a tool refuses",
        f"{seen - len(faults)} of {seen}", "at least 95%", judged(len(faults) <= 0.05 * seen), "; ".join(faults[:3]),
    )  # fmt: skip
