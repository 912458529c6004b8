"""Faults of the server: each ends in a clear error within its deadline, with nothing left running."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest

from launch.serving import server as servers
from launch.serving import sglang_command
from launch.serving.client import Client, all_at_once
from launch.serving.server import Server, again, free_port, running
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, PreflightError, SanityError
from tests.launch.serving.fake_server import SLOW_S
from tests.launch.support import alive, descendants

pytestmark = pytest.mark.run

FAKE = Path(__file__).parent / "fake_server.py"
TIMEOUT = 3
SILENT = (
    r"did not answer /x: no sign of work for sanity\.timeout=3 s; "
    r"on a slow machine write `make sanity sanity\.timeout=6`; the end of "
)


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Starts a server with this fault, healthy at first; sees to it afterwards that nothing of it is left."""

    @contextlib.contextmanager
    def start(fault, up_within=60):
        monkeypatch.setattr(
            sglang_command,
            "command",
            lambda recipe, checkpoint, port, thinks: [sys.executable, str(FAKE), str(port), fault],
        )
        log, before = tmp_path / "log", set(descendants(os.getpid()))
        try:
            with Server(compose_recipe([f"sanity.timeout={up_within}"]), tmp_path, log, True) as server:
                server.timeout = TIMEOUT
                yield server
        finally:
            started = [int(pid) for line in log.read_text().splitlines()[:1] for pid in line.split()[1:]]
            assert not alive([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], 3)
            assert not set(descendants(os.getpid())) - before

    return start


@pytest.mark.run
def test_a_checkpoint_that_cannot_be_loaded_shows_the_end_of_the_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = Server(compose_recipe([]), tmp_path, tmp_path / "log", True)
    with pytest.raises(SanityError, match="SGLang ended with status") as error, server:
        raise AssertionError("it must not come up")
    assert str(tmp_path / "log") in str(error.value)
    assert not alive([p for p in descendants(os.getpid()) if "sglang" in " ".join(p.cmdline())])


@pytest.mark.run
def test_a_good_server_answers_and_streams(faulty):
    with faulty("good") as server:
        assert server.own
        assert server.get("/x") == {"get": True}
        assert server.post("/x", {"a": "ü"})["pid"] in {p.pid for p in descendants(os.getpid())}
    with faulty("stream") as server:
        assert list(server.stream("/x", {})) == [{"n": 1}, {"n": 2}]


@pytest.mark.run
@pytest.mark.parametrize("fault", ["never_up", "stays_silent", "unhealthy"])
def test_a_server_that_does_nothing_does_not_come_up_and_is_ended(faulty, fault):
    started = time.monotonic()
    says = (
        r"^SGLang did not come up: no sign of work and no log output for sanity\.timeout=3 s\n?.*"
        r"on a slow machine write `make sanity sanity\.timeout=6`; the end of .*log:\nchildren"
    )
    with pytest.raises(SanityError, match=says), faulty(fault, TIMEOUT):
        raise AssertionError("it must not come up")
    assert time.monotonic() - started < 30


@pytest.mark.run
@pytest.mark.parametrize("sign", ["writes", "computes"])
def test_a_server_that_is_at_work_is_waited_for(faulty, sign):
    """Longer than it may be silent."""
    started = time.monotonic()
    with faulty(sign, TIMEOUT) as server:
        assert time.monotonic() - started > SLOW_S > 2 * TIMEOUT
        assert server.healthy()


@pytest.mark.run
@pytest.mark.parametrize("how", ["slow", "trickle"])
def test_an_answer_of_which_something_comes_is_waited_for(faulty, how):
    with faulty(how) as server:
        started = time.monotonic()
        assert "pid" in server.post("/x", {})
        assert time.monotonic() - started > 2 * TIMEOUT


@pytest.mark.run
def test_an_answer_that_waits_for_others_is_waited_for(faulty):
    with faulty("queue") as server, ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        assert all("pid" in answer for answer in pool.map(lambda n: server.post("/x", {"n": n}), range(8)))
        assert time.monotonic() - started > 2 * TIMEOUT


@pytest.mark.slow
def test_sglang_is_waited_for_while_its_tokens_come(bases, tmp_path):
    """By its own figures: the answer comes whole, at its end."""
    tokens = 5000
    with Server(compose_recipe(["sanity.timeout=60"]), bases["qwen3-tiny"], tmp_path / "log", True) as server:
        server.timeout, started = TIMEOUT, time.monotonic()
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answer = server.post("/generate", {"input_ids": [5, 6, 7], "sampling_params": sampling})
        assert len(answer["output_ids"]) == tokens
        assert time.monotonic() - started > 2 * TIMEOUT


@pytest.mark.run
def test_a_stream_of_which_something_comes_is_waited_for(faulty):
    with faulty("slow_stream") as server:
        assert [chunk["n"] for chunk in server.stream("/x", {})] == list(range(int(SLOW_S)))


@pytest.mark.run
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("error", r"answered 500 to /x: .*out of memory in layer 7"),
        ("redirect", r"answered 307 to /x"),
        ("no_json", r"answer to /x is not JSON: .<html>a proxy's page"),
        ("half", r"did not answer /x: IncompleteRead"),
        (
            "die",
            r"did not answer /x: .*SGLang ended with status 7; the end of .*CUDA error: an illegal memory access$",
        ),
        ("hang", SILENT),
        ("drip", SILENT),
    ],
)
def test_a_fault_in_an_answer_is_named_and_silence_ends_it(faulty, fault, says):
    with faulty(fault) as server:
        started = time.monotonic()
        with pytest.raises(SanityError, match=f"(?s){says}") as error:
            server.post("/x", {})
        assert time.monotonic() - started < TIMEOUT + 25
    cause = error.value.__cause__
    assert cause is not None
    if fault == "error":
        assert isinstance(cause, HTTPError) and cause.code == 500


@pytest.mark.run
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("cut", r"did not answer /x: the stream ended without its \[DONE\]"),
        ("stream_error", r"broke off its answer to /x: .*the scheduler is gone"),
        ("stream_die", r"SGLang ended with status 7"),
        ("stream_hang", r"no sign of work for sanity\.timeout=3 s"),
        ("error", r"answered 500 to /x"),
        ("drip", r"no sign of work for sanity\.timeout=3 s"),
    ],
)
def test_a_fault_in_a_stream_is_named_after_what_came(faulty, fault, says):
    came = []
    with faulty(fault) as server:
        started = time.monotonic()
        with pytest.raises(SanityError, match=f"(?s){says}"):
            for chunk in server.stream("/x", {}):
                came.append(chunk)
        assert time.monotonic() - started < TIMEOUT + 25
    assert came == ([] if fault in ("error", "drip") else [{"n": 1}, {"n": 2}])


def test_an_error_waits_for_no_other_answer():
    go_on, ended = threading.Event(), threading.Event()

    def ask(wait):
        if wait:
            go_on.wait()
            ended.set()
        raise SanityError("no answer")

    try:
        with pytest.raises(SanityError, match="no answer"):
            all_at_once(ask, [False, True])
        assert not ended.is_set()
    finally:
        go_on.set()


@pytest.mark.run
def test_a_server_that_died_between_two_questions_is_named_as_dead(faulty):
    with faulty("die") as server:
        for _ in range(2):
            with pytest.raises(SanityError, match="SGLang ended with status 7"):
                server.post("/x", {})


@pytest.mark.run
def test_waiting_for_a_server_ends_when_it_does(faulty):
    with faulty("good") as server:
        leader = psutil.Process(server.post("/x", {})["pid"])
        # Its children in other sessions die with it in this test: nobody could find them afterwards.
        for child in leader.children(recursive=True):
            if os.getsid(child.pid) != leader.pid:
                child.kill()
        leader.kill()
        with pytest.raises(SanityError, match="SGLang ended with status -9; the end of "):
            server.wait()


def test_a_python_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sglang_command, "command", lambda recipe, checkpoint, port, thinks: ["/nowhere/python", "-m", "sglang"]
    )
    with pytest.raises(PreflightError, match=r"'/nowhere/python'; write engine\.python=PYTHON"):
        Server(compose_recipe([]), tmp_path, tmp_path / "log", True).__enter__()


def test_a_free_port_is_given_as_asked_and_a_taken_one_refused():
    port = free_port(None)
    assert free_port(port) == port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PreflightError, match=f"sanity.port={port}"):
        free_port(port)


@pytest.fixture
def stranger():
    """A server that this test did not start as its own, and its port."""
    port = free_port(None)
    process = subprocess.Popen([sys.executable, str(FAKE), str(port), "good"], stdout=subprocess.DEVNULL)
    while not Client(f"http://127.0.0.1:{port}", 1).healthy():
        time.sleep(0.05)
    yield process, port
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


@pytest.mark.run
def test_a_stranger_on_the_port_is_not_taken_for_our_server_and_left_alone(faulty, stranger, monkeypatch):
    process, port = stranger
    monkeypatch.setattr(servers, "free_port", lambda wanted: port)
    with pytest.raises(SanityError, match=f"port {port} belongs to another process"), faulty("never_up"):
        raise AssertionError("its answers are not our server's")
    assert process.poll() is None and Client(f"http://127.0.0.1:{port}", 1).healthy()


@pytest.mark.run
def test_a_server_at_sanity_url_is_used_and_left_alone(stranger, tmp_path):
    process, port = stranger
    recipe = compose_recipe([f"sanity.url=http://127.0.0.1:{port}/", f"sanity.timeout={TIMEOUT}"])
    before = set(descendants(os.getpid()))
    with running(recipe, tmp_path, tmp_path / "log", True) as client:
        assert not client.own
        assert client.post("/x", {}) == {"pid": process.pid}
        assert set(descendants(os.getpid())) == before
    assert not (tmp_path / "log").exists()
    assert client.post("/x", {}) == {"pid": process.pid}


@pytest.mark.parametrize(
    ("folder", "words", "command"),
    [
        ("runs/first/hf", ["optim.lr=1"], "make sanity run=first 'cluster.root={root}'"),
        ("runs/first/hf-step000002", [], "make sanity 'checkpoint={root}/runs/first/hf-step000002' 'cluster.root={root}'"),
        (
            "other", ["model=glm4.5-tiny", "sanity.timeout=3", "model.checkpoint=/a b"],
            "make sanity model=glm4.5-tiny 'model.checkpoint=/a b'",
        ),
    ],
)  # fmt: skip
def test_advice_leads_to_the_check_alone(tmp_path, folder, words, command):
    root = tmp_path / "a root"
    (root / folder).mkdir(parents=True)
    if folder.startswith("runs"):
        (root / folder).with_name("config.yaml").touch()
        words = [*words, f"cluster.root={root}", "run=first"]
    assert again("sanity", compose_recipe(words), root / folder) == command.format(root=root)
    assert again("serve", compose_recipe(words), root / folder).startswith("make serve ")


def test_nothing_at_sanity_url_is_refused_and_nothing_started(tmp_path):
    recipe = compose_recipe([f"sanity.url=http://127.0.0.1:{free_port(None)}"])
    with pytest.raises(PreflightError, match=r"does not answer /health.*write sanity\.url=null"):
        running(recipe, tmp_path, tmp_path / "log", True).__enter__()
    for wrong in (
        "head:30000",
        "http://head:30000/v1",
        "http://head:port",
        "http://head:99999",
        "ftp://head",
        "http://",
    ):
        with pytest.raises(ConfigError, match=r"write sanity\.url=http://HOST:30000"):
            compose_recipe([f"sanity.url={wrong}"])
