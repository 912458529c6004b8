"""The real SGLang as two node ranks that meet, by the command line of a model that no node holds. It answers greedily as one does."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from launch.cluster.processes import in_session
from launch.serving import sglang_command
from launch.serving.client import Client
from tests.launch.support import free_port, recipe_of

pytestmark = pytest.mark.slow
QUESTION = {"text": "<|im_start|>user\n", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}


@contextlib.contextmanager
def server(commands, env, folder):
    """Start SGLang's processes; yield a client of the first. They have ended after the block."""
    started = []
    try:
        for number, words in enumerate(commands):
            with (folder / f"rank{number}.log").open("wb") as log:
                started.append(subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True))
        client = Client(f"http://127.0.0.1:{commands[0][commands[0].index('--port') + 1]}", 60)
        deadline = time.monotonic() + 300
        while not client.healthy():
            said = [(folder / f"rank{number}.log").read_text()[-1500:] for number in range(len(started))]
            assert all(one.poll() is None for one in started), said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        yield client
    finally:
        for one in started:
            for process in in_session(one.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            one.wait()


def test_two_node_ranks_answer_as_one_server(root, tmp_path, monkeypatch):
    recipe, _, _ = recipe_of(root)
    checkpoint = root.joinpath("models").glob("qwen3-tiny*").__next__()
    env = sglang_command.environment(recipe, checkpoint)
    alone = sglang_command.command(recipe, checkpoint, free_port(), True)
    with server([alone], env, tmp_path) as client:
        wanted = client.post("/generate", QUESTION)["output_ids"]
    monkeypatch.setenv(sglang_command.MEETING, f"127.0.0.1:{free_port()} 2")
    both = [[*sglang_command.command(recipe, checkpoint, free_port(), True, rank), "--tp-size", "2"] for rank in (0, 1)]
    with server(both, {**env, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}, tmp_path) as client:
        assert client.post("/generate", QUESTION)["output_ids"] == wanted
