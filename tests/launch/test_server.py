"""Faults of the server: each ends in a clear error, with nothing left running."""

import os
import socket
import time

import pytest

from launch.sanity.server import Server, command, free_port
from recipes.compose import compose_recipe
from recipes.errors import PreflightError, SanityError
from tests.launch.support import alive, descendants


def test_a_checkpoint_that_cannot_be_loaded_shows_the_end_of_the_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = Server(compose_recipe([]), tmp_path, tmp_path / "log")
    with pytest.raises(SanityError, match="SGLang ended with status") as error, server:
        raise AssertionError("it must not come up")
    assert str(tmp_path / "log") in str(error.value)
    assert not alive([p for p in descendants(os.getpid()) if "sglang" in " ".join(p.cmdline())])


def test_a_server_that_never_answers_is_ended_at_its_deadline(bases, tmp_path):
    server = Server(compose_recipe(["sanity.timeout=2"]), bases["qwen3-tiny"], tmp_path / "log")
    started = time.monotonic()
    with pytest.raises(SanityError, match=r"within sanity\.timeout=2 s; raise it"), server:
        raise AssertionError("two seconds are too few")
    assert time.monotonic() - started < 20
    assert not alive([p for p in descendants(os.getpid()) if "sglang" in " ".join(p.cmdline())])


def test_the_server_listens_on_loopback_and_runs_no_code_of_the_checkpoint(bases):
    line = command(compose_recipe(["model=glm4.5-tiny"]), bases["glm4.5-tiny"], 1234)
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert "--trust-remote-code" not in line
    assert line[line.index("--tool-call-parser") + 1] == "glm45"


def test_a_free_port_is_given_as_asked_and_a_taken_one_refused():
    port = free_port(None)
    assert free_port(port) == port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PreflightError, match=f"sanity.port={port}"):
        free_port(port)
