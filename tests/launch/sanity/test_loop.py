"""The closed loop over real HTTP with scripted agents, each counted right; and with a trained model."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_prep.sample import make, tools
from launch.checks import Outcome
from launch.sanity.loop import loop, sandbox
from launch.sanity.loop.loop import Task, Work
from launch.serving.server import Server
from recipes.compose.recipe import compose_recipe
from recipes.errors import SanityError
from tests.launch.support import limi

pytestmark = pytest.mark.run

Agent = Callable[[dict[str, Any]], dict[str, Any]]  # request in, message out
SAMPLE = Path(make.__file__).parent


def records(name: str) -> list[dict[str, Any]]:
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"id": f"{name}-{n}", **json.loads(line)} for n, line in enumerate(lines)]


class Conversations:
    """As much of a data set as the loop reads."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines = lines

    def conversations(self) -> Iterator[dict[str, Any]]:
        return iter(self.lines)


TRAIN, HELDOUT = Conversations(records("train")), Conversations(records("heldout"))
TOKENS = 128
TASKS = loop.tasks(TRAIN)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def protected() -> None:
    if why := sandbox.available():
        pytest.skip(why)


@contextmanager
def served(agent: Agent, tmp_path: Path, status: int = 200) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and request["temperature"] == 0
            message = {"role": "assistant", **agent(request)}
            reason = message.pop("finish_reason", "tool_calls" if message.get("tool_calls") else "stop")
            body = json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        server = Server(compose_recipe([]), tmp_path, tmp_path / "log", True)
        server.url = f"http://127.0.0.1:{http.server_port}"
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def called(*calls: tuple[str, Any]) -> dict[str, Any]:
    made = [
        {"id": f"c{n}", "type": "function",
         "function": {"name": name, "arguments": words if isinstance(words, str) else json.dumps(words)}}
        for n, (name, words) in enumerate(calls)
    ]  # fmt: skip
    return {"content": None, "tool_calls": made}


def perfect(request: dict[str, Any]) -> dict[str, Any]:
    """The recorded message, where all before it is as recorded, tool results included."""
    messages = request["messages"]
    (record,) = (r for r in TRAIN.lines + HELDOUT.lines if r["messages"][1] == messages[1])
    told = [m["content"] for m in messages if m["role"] != "assistant"]
    before = record["messages"][: len(messages)]
    assert told == [m["content"] for m in before if m["role"] != "assistant"] and request["tools"] == tools.TOOLS
    message = record["messages"][len(messages)]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    return {**(called(*calls) if calls else {}), "content": message["content"]}


def first_work(agent: Agent, tmp_path: Path, task: Task = TASKS[0]) -> Work:
    with served(agent, tmp_path) as server:
        return loop.work(server, task, TOKENS)


def test_a_perfect_agent_finishes_every_task_as_recorded(tmp_path):
    with served(perfect, tmp_path) as server:
        closed, bursts, protection = loop.closed_loop(server, TRAIN, HELDOUT, TOKENS, 1.0)  # type: ignore[arg-type]
    calls = sum(len(m.get("tool_calls", [])) for r in TRAIN.lines + HELDOUT.lines for m in r["messages"])
    assert closed.outcome is Outcome.passed and closed.figure.startswith(
        f"20 of 20 tasks (100%), held-out 4 of 4; {calls} calls, "
    )
    assert (
        "24 answered" in closed.figure
        and "0 not JSON" in closed.figure
        and closed.limit == "at least 100% of the trained"
    )
    assert bursts.outcome is Outcome.passed and "at most 3; recorded" in bursts.figure
    assert protection.outcome is Outcome.passed and protection.figure == ", ".join(sandbox.PROTECTIONS)


def test_a_runaway_agent_is_stopped_and_counted(tmp_path):
    done = first_work(lambda _: called(("list_files", {"path": "."})), tmp_path)
    assert (done.stopped, done.turns, done.calls, done.errors) == ("too many turns", 6, [1] * 6, 0)
    closed, bursts, _ = loop.of_works([done], [], 0.5)
    assert closed.outcome is Outcome.failed and "it stopped: too many turns" in closed.detail
    assert bursts.outcome is Outcome.passed
    assert loop.of_works([done], [], None)[0].outcome is Outcome.passed


def test_a_burst_agent_fails_and_its_further_calls_are_not_run(tmp_path):
    writes = [("write_file", {"path": f"{n}.txt", "content": "x"}) for n in range(20)]
    done = first_work(lambda r: {"content": "ok"} if len(r["messages"]) > 2 else called(*writes), tmp_path)
    assert (done.stopped, done.calls, done.errors) == ("answered", [20], 20 - loop.MAX_CALLS)
    assert done.difference.startswith("it says 'ok', but the record says ")
    bursts = loop.of_works([done], [], None)[1]
    assert (
        bursts.outcome is Outcome.failed
        and bursts.limit == "at most 4"
        and bursts.figure.startswith("20.00, at most 20; recorded 2.00")
    )


def test_arguments_that_are_not_json_are_counted_and_answered_with_an_error(tmp_path):
    seen = []

    def agent(request: dict[str, Any]) -> dict[str, Any]:
        seen.append(request["messages"][-1])
        return called(("read_file", '{"path": ')) if len(seen) < 3 else {"content": "done"}

    done = first_work(agent, tmp_path)
    assert (done.unparsed, done.errors, done.stopped) == (2, 2, "answered")
    assert seen[1]["content"] == "error: arguments must be an object" and seen[1]["tool_call_id"] == "c0"


def test_other_words_or_files_than_the_recorded_ones_are_seen(tmp_path):
    task = TASKS[1]

    def other_file(request: dict[str, Any]) -> dict[str, Any]:
        if any(m["role"] == "tool" for m in request["messages"]):
            return {"content": task.answers[len([m for m in request["messages"] if m["role"] == "user"]) - 1]}
        return called(("write_file", {"path": "other.txt", "content": "x"}))

    done = first_work(other_file, tmp_path, task)
    assert done.stopped == "answered" and not done.as_recorded
    assert done.difference == f"at its end {', '.join(sorted([*task.files, 'other.txt']))} differs from the record"


def test_thinking_goes_back_apart_from_the_words_and_is_no_part_of_the_answer(tmp_path):
    def agent(request: dict[str, Any]) -> dict[str, Any]:
        assert request["separate_reasoning"] is False
        before = [m for m in request["messages"] if m["role"] == "assistant"]
        assert all((m["content"], m["reasoning_content"]) == ("I read it.", "So.") for m in before)
        message = perfect(request)
        return {**message, "content": f"<think>\nSo.\n</think>\n\n{message['content']}\n"}

    assert first_work(agent, tmp_path).as_recorded


def test_words_without_thinking_go_back_as_words(tmp_path):
    def agent(request: dict[str, Any]) -> dict[str, Any]:
        before = [m for m in request["messages"] if m["role"] == "assistant"]
        assert all(set(m) == {"role", "content", "tool_calls"} and m["content"] == "I read it." for m in before)
        message = perfect(request)
        return {**message, "content": f"<think></think>\n{message['content']}" if before else message["content"]}

    assert first_work(agent, tmp_path).as_recorded


def test_an_answer_cut_short_and_a_refused_prompt_are_reasons_to_stop(tmp_path):
    assert first_work(lambda _: {"content": "an", "finish_reason": "length"}, tmp_path).stopped == "length"
    with served(perfect, tmp_path, status=400) as server:
        assert loop.work(server, TASKS[0], TOKENS).stopped == "refused"
    with served(perfect, tmp_path, status=500) as server, pytest.raises(SanityError, match="answered 500"):
        loop.work(server, TASKS[0], TOKENS)


def test_a_hostile_agent_reaches_nothing(tmp_path):
    script = f"open({str(tmp_path / 'x')!r}, 'w')"
    calls = [("write_file", {"path": "a.py", "content": script}), ("run", {"command": "python a.py"}),
             ("read_file", {"path": "../../etc/shadow"})]  # fmt: skip
    done = first_work(lambda r: {"content": "ok"} if len(r["messages"]) > 2 else called(*calls), tmp_path)
    assert done.errors == 2 and not (tmp_path / "x").exists()


def test_a_data_set_with_other_tools_is_left_out_by_name(tmp_path):
    other = Conversations([{**record, "tools": tools.TOOLS[:1]} for record in TRAIN.lines])
    server = Server(compose_recipe([]), tmp_path, tmp_path / "log", True)
    (check,) = loop.closed_loop(server, other, HELDOUT, TOKENS, 1.0)  # type: ignore[arg-type]
    assert (
        check.outcome is Outcome.passed
        and check.name == "closed loop"
        and check.figure.startswith("left out: no task of the sample")
    )


def test_without_protection_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: "unshare: Operation not permitted")
    server = Server(compose_recipe([]), tmp_path, tmp_path / "log", True)
    closed, protection = loop.closed_loop(server, TRAIN, HELDOUT, TOKENS, 0.5)  # type: ignore[arg-type]
    assert closed.outcome is protection.outcome is Outcome.failed and "sanity.min_finished=null" in protection.detail
    assert protection.figure == "not run: unshare: Operation not permitted"
    assert {c.outcome for c in loop.closed_loop(server, TRAIN, HELDOUT, TOKENS, None)} == {Outcome.warned}  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_trained_model_finishes_its_tasks(root):
    done = limi("train", "model=qwen3-tiny", f"cluster.root={root}", "run=closed-loop")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {c["name"]: c for c in json.loads((root / "runs/closed-loop/sanity.json").read_text())}
    assert checks["loop protection"]["figure"] == ", ".join(sandbox.PROTECTIONS)
    assert int(checks["closed loop"]["figure"].split()[0]) >= 14
