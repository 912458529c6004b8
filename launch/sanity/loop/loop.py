"""The closed loop: the served model works on whole tasks of the sample, and its calls run in a sandbox. Finished tasks are counted."""

import json
import time
import urllib.error
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.pack.dataset import Dataset
from data_prep.sample import make, tools
from launch.checks import Check, Outcome, judged
from launch.sanity.behaviour import answers
from launch.sanity.loop import sandbox
from launch.sanity.loop.sandbox import Sandbox
from launch.serving.client import Client, all_at_once
from recipes.errors import SanityError

MAX_CALLS = 16  # calls of one turn that are run; further calls get an error as their result
_TOO_MANY = f"error: more than {MAX_CALLS} calls in one turn"
_ENDED = "answered"  # stop reason of a task that was worked to its end
# Turns of a task beyond the recorded ones: on a CPU a turn takes seconds, and a lost model rarely recovers.
_MORE_TURNS = 4


@dataclass(frozen=True)
class Task:
    """A recorded conversation and the files that its folder initially contains."""

    conversation: dict[str, Any]
    files: Mapping[str, str]

    @property
    def requests(self) -> list[str]:
        return [m["content"] for m in self.conversation["messages"] if m["role"] == "user"]

    @property
    def turns(self) -> list[dict[str, Any]]:
        return [m for m in self.conversation["messages"] if m["role"] == "assistant"]

    @property
    def answers(self) -> list[str]:
        """The final reply to each request."""
        return [m["content"] for m in self.turns if not m.get("tool_calls")]


@dataclass
class Work:
    """The model's work on a task. stopped: why it ended; `answered` if every request got its final reply."""

    task: Task
    stopped: str = ""
    calls: list[int] = field(default_factory=list)  # number of calls of each turn with calls
    errors: int = 0  # number of tool results that are errors
    unparsed: int = 0  # number of calls whose arguments are not JSON
    turns: int = 0
    answers: list[str] = field(default_factory=list)
    difference: str = ""  # first difference of replies or files from the record
    seconds: float = 0.0

    @property
    def as_recorded(self) -> bool:
        return self.stopped == _ENDED and not self.difference

    def __str__(self) -> str:
        why = self.difference if self.stopped == _ENDED else f"it stopped: {self.stopped}. {self.difference}".strip()
        task = f"{self.task.conversation['id']}, {self.task.requests[0]!r}"
        return f"{task}, {self.turns} turns of {len(self.task.turns)}: {why}"


def tasks(data: Dataset) -> list[Task]:
    """Return the data set's tasks that belong to the sample: only their tools and initial files are known."""
    starts = make.starting_files()
    out = []
    for conversation in data.conversations():
        first = next(m["content"] for m in conversation["messages"] if m["role"] == "user")
        functions = [tool["function"] for tool in conversation["tools"]]  # the server adds a key beside them
        if functions == [tool["function"] for tool in tools.TOOLS] and first in starts:
            out.append(Task(conversation, starts[first]))
    return out


def work(client: Client, task: Task, tokens: int) -> Work:
    """Let the model work on the task's requests in order, with greedy sampling. Calls run in a sandbox of the task's own.

    tokens: token limit of an answer.
    """
    done, started = Work(task), time.monotonic()
    messages = [m for m in task.conversation["messages"] if m["role"] == "system"]
    with Sandbox(task.files) as box:
        for request in task.requests:
            messages.append({"role": "user", "content": request})
            done.stopped = _work_on(client, task, tokens, messages, box, done)
            if done.stopped != _ENDED:
                break
        done.difference = _difference(done, box.state(), recorded_state(task))
    done.seconds = time.monotonic() - started
    return done


def _work_on(client: Client, task: Task, tokens: int, messages: list[dict[str, Any]], box: Sandbox, done: Work) -> str:
    """Request answers and run their calls until the final reply to the request. Return the stop reason.

    Counts and the reply are added to `done`, messages to `messages`.
    """
    while done.turns < len(task.turns) + _MORE_TURNS:
        try:
            choice = _ask(client, messages, task.conversation["tools"], tokens)
        except SanityError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 400:
                return "refused"  # e.g. a prompt longer than the context
            raise
        done.turns += 1
        message = choice["message"]
        thinking, said = _said(message.get("content") or "")
        answer = {"content": said, "reasoning_content": thinking, "tool_calls": message.get("tool_calls")}
        messages.append({"role": "assistant", **{k: v for k, v in answer.items() if v or k == "content"}})
        if choice["finish_reason"] not in ("tool_calls", "stop"):
            return str(choice["finish_reason"])
        if not message.get("tool_calls"):
            done.answers.append(said)
            return _ENDED
        messages += _run(message["tool_calls"], box, done)
    return "too many turns"


def _ask(client: Client, messages: list[dict[str, Any]], offered: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    body = {
        "model": "default", "messages": messages, "tools": offered, "temperature": 0, "max_tokens": tokens,
        # If a model was trained without thinking, SGLang's parser treats its whole answer as thinking; `_said` splits instead.
        "separate_reasoning": False,
    }  # fmt: skip
    return dict(client.post("/v1/chat/completions", body)["choices"][0])


def _said(text: str) -> tuple[str, str]:
    """Return an answer's thinking and its reply, separated as chat templates expect them; either may be empty."""
    thinking, mark, said = text.rpartition("</think>")
    return thinking.replace("<think>", "").strip() if mark else "", said.strip()


def _run(calls: list[dict[str, Any]], box: Sandbox, done: Work) -> list[dict[str, Any]]:
    """Run the calls of one turn and return the tools' messages in order."""
    done.calls.append(len(calls))
    results = []
    for number, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:  # remains text, which every tool refuses
            done.unparsed += 1
        text = box.call(name, arguments) if number < MAX_CALLS else _TOO_MANY
        done.errors += text.startswith("error: ")
        results.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": text})
    return results


def recorded_state(task: Task) -> dict[str, str]:
    """Return the folder's content after the recorded calls, as `Sandbox.state` does."""
    with Sandbox(task.files) as box:
        for turn in task.turns:
            for call in turn.get("tool_calls", []):
                box.call(call["function"]["name"], call["function"]["arguments"])
        return box.state()


def _difference(done: Work, state: dict[str, str], recorded: dict[str, str]) -> str:
    for said, expected in zip(done.answers, done.task.answers, strict=False):
        if said != expected.strip():
            return f"it says {said[:200]!r}, but the record says {expected!r}"
    paths = sorted(path for path in state.keys() | recorded.keys() if state.get(path) != recorded.get(path))
    return f"at its end {', '.join(paths[:3])} differs from the record" if paths else ""


def closed_loop(
    client: Client, data: Dataset, heldout: Dataset | None, tokens: int, least: float | None
) -> list[Check]:
    """Run the closed loop and return its checks.

    tokens: token limit of an answer. least: lowest share of the trained tasks that must be finished as recorded; None judges none.
    Nothing is run if the data has no task of the sample, or if the machine cannot protect the calls.
    """
    trained = tasks(data)
    new = tasks(heldout) if heldout else []
    if not trained:
        return [
            _closed("left out: no task of the sample, and only its tools can be run here", None, Outcome.passed, "")
        ]
    if why := sandbox.available():
        fix = "run it on a machine that allows user namespaces (user.max_user_namespaces), or write sanity.min_finished=null"
        outcome = Outcome.warned if least is None else Outcome.failed
        return [
            _closed("not run", least, outcome, "tool calls cannot be protected here"),
            _protection(f"not run: {why}", outcome, fix),
        ]
    works = all_at_once(lambda task: work(client, task, tokens), [*trained, *new])
    return of_works(works[: len(trained)], works[len(trained) :], least)


def of_works(trained: list[Work], new: list[Work], least: float | None) -> list[Check]:
    """Return the checks of the work on trained and on held-out (new) tasks. least: as in `check`."""
    works = trained + new
    right = sum(w.as_recorded for w in trained)
    stops = Counter(w.stopped for w in works)
    calls = sum(sum(w.calls) for w in works)
    unseen = f", held-out {sum(w.as_recorded for w in new)} of {len(new)}" if new else ""
    figure = (
        f"{right} of {len(trained)} tasks ({right / len(trained):.0%}){unseen}; {calls} calls, "
        f"{sum(w.errors for w in works)} errors, {sum(w.unparsed for w in works)} not JSON; "
        f"{', '.join(f'{n} {stop}' for stop, n in stops.most_common())}; longest {max(w.seconds for w in works):.1f} s"
    )
    wrong = next((w for w in trained if not w.as_recorded), None)
    passed = least is None or right / len(trained) >= least
    recorded = [len(turn["tool_calls"]) for w in works for turn in w.task.turns if turn.get("tool_calls")]
    return [
        _closed(figure, least, judged(passed), "" if passed or wrong is None else str(wrong)),
        answers.bursts("calls per turn, in the loop", ((n, w) for w in works for n in w.calls), recorded),
        _protection(", ".join(sandbox.PROTECTIONS), Outcome.passed, ""),
    ]


def _closed(figure: str, least: float | None, outcome: Outcome, detail: str) -> Check:
    limit = "shown" if least is None else f"at least {least:.0%} of the trained"
    return Check(
        "closed loop",
        "an agent that fails once the earlier turns are its own, not recorded ones",
        figure,
        limit,
        outcome,
        detail,
    )


def _protection(figure: str, outcome: Outcome, detail: str) -> Check:
    return Check(
        "loop protection", "a tool call that harms this machine", figure, "all, or nothing is run", outcome, detail
    )
