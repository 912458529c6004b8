"""`make serve`: what it prints works as it is printed, and nothing is left after it."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.serving import serve
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from tests.conftest import REPO
from tests.launch.support import alive, called, descendants, free_port


class Answers:
    """A server whose every answer has this text."""

    url = "http://127.0.0.1:1"

    def __init__(self, text):
        self.text = text

    def post(self, path, body):
        assert body["separate_reasoning"] is False, "or the text would not show whether the model thinks"
        return {"choices": [{"message": {"content": self.text, "tool_calls": None}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(("text", "apart"), [("<think>\nso</think>Yes.", True), ("Yes.", False)])
def test_reasoning_is_left_where_it_is_for_a_model_that_does_not_think(text, apart):
    shown = serve.examples(Answers(text))
    assert ("separate_reasoning" in shown) == (not apart)
    compile(python_of(shown), "shown", "exec")


def test_a_server_that_is_up_is_not_served_again():
    with pytest.raises(ConfigError, match=r"leave out sanity\.url"):
        serve.serve(compose_recipe(["sanity.url=http://127.0.0.1:30000"]), None)


def test_a_dry_run_shows_sglang_s_command_line_for_the_named_machine(bases, tmp_path):
    words = [f"checkpoint={bases['glm4.5-tiny']}", "model=glm4.5-tiny", f"cluster.root={tmp_path}", "dry_run=true"]
    done = called("serve", *words)
    assert done.returncode == 0, done.stderr
    assert "SGLANG_USE_CPU_ENGINE=1" in done.stdout and "--tool-call-parser glm45" in done.stdout
    done = called("serve", *words, "gpu=h100", "sanity.port=1234")
    assert "--dtype bfloat16 --tp-size 1 --context-length 8192" in done.stdout and "--port 1234" in done.stdout
    assert "SGLANG_USE_CPU_ENGINE" not in done.stdout
    assert not list(tmp_path.iterdir())


def python_of(shown):
    return re.search(r"^from openai.*?^print.*?$", shown, re.S | re.M)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_what_serve_prints_can_be_copied_and_it_ends_with_everything(root, bases, sign):
    port = free_port()
    words = [f"checkpoint={bases['qwen3-tiny']}", "model=qwen3-tiny", f"cluster.root={root}", f"sanity.port={port}"]
    process = subprocess.Popen(
        [sys.executable, "launch/limi.py", "serve", *words], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    shown = ""
    try:
        while f"up at http://127.0.0.1:{port}" not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        started = descendants(process.pid)
        assert len(started) >= 2
        curl = re.search(r"^curl .*$", shown, re.M)[0]
        done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=120)
        answer = json.loads(done.stdout)["choices"][0]
        assert answer["message"]["reasoning_content"] is None
        done = subprocess.run([sys.executable, "-c", python_of(shown)], capture_output=True, text=True, timeout=120)
        assert done.stdout.startswith("ChatCompletionMessage("), done.stderr
        assert process.poll() is None
    finally:
        asked = time.monotonic()
        process.send_signal(sign)
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert process.returncode == 130
    assert output.endswith("SGLang has ended.\n")
    assert not alive(started)
