"""What a command is connected to: streams that are closed, full or without some characters, and terminals of every kind."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import REPO
from tests.launch.support import alive

pytestmark = pytest.mark.run

LIMI = [sys.executable, "launch/limi.py"]
SAMPLE = REPO / "data_prep" / "sample" / "train.jsonl"
PLAN = ["plan", "model=qwen3-4b", "cluster=h100x8"]  # of a model that is not here: nothing is packed


def run(tmp_path, *words, shell="exec {limi}", **env):
    """`{limi}` in the shell text becomes the command."""
    limi = " ".join(f"'{w}'" for w in (*LIMI, *words, f"cluster.root={tmp_path}"))
    return subprocess.run(
        ["bash", "-c", shell.format(limi=limi)], cwd=REPO, env={**os.environ, **env}, capture_output=True, timeout=60
    )


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_characters_that_cannot_be_shown_are_replaced(tmp_path, env):
    done = run(tmp_path / "ü", *PLAN, **env)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "ü" / "plans" / "qwen3-4b" / "plan.json").is_file()


def test_an_error_shows_in_every_encoding(tmp_path):
    done = run(tmp_path, "data", "data.path=/nowhere/ü.jsonl", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(b"DataError: no file '/nowhere/\\xfc.jsonl'; write data.path=FILE")


@pytest.mark.parametrize("columns", ["1", "20", "400"])
@pytest.mark.parametrize("env", [{"TERM": "dumb", "NO_COLOR": "1"}, {"TERM": "xterm-256color", "FORCE_COLOR": "1"}])
def test_any_width_and_kind_of_terminal(tmp_path, columns, env):
    done = run(tmp_path, *PLAN, COLUMNS=columns, **env)
    assert done.returncode == 0, done.stderr
    assert (b"\x1b[" in done.stdout) == ("FORCE_COLOR" in env)


def test_a_reader_that_leaves_ends_the_command_without_a_word(tmp_path):
    done = run(tmp_path, *PLAN, shell="set -o pipefail; {limi} | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stdout.count(b"\n") == 1 and done.stdout.startswith(b"not on this machine")
    assert done.stderr == b""


def test_a_manifest_of_which_only_the_head_is_read(tmp_path):
    words = ["kuberay", "model=glm4.5"]
    done = run(tmp_path, *words, shell="{limi} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_full_disk_behind_standard_output_is_named(tmp_path):
    done = run(tmp_path, *PLAN, shell="exec {limi} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "PreflightError: standard output cannot be written: No space left on device; make room where it goes, or send it elsewhere\n"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path, closed):
    assert run(tmp_path, *PLAN, shell=f"exec {{limi}} {closed}").returncode == 0
    written = (tmp_path / "plans" / "qwen3-4b" / "plan.html").read_text()
    assert "not on this machine" not in written, "no file has taken the number of a stream"
    assert run(tmp_path, "plan", "optim.lrr=1", shell=f"exec {{limi}} {closed}").returncode == 2


def test_a_full_standard_error_leaves_the_status(tmp_path):
    assert run(tmp_path, "plan", "optim.lrr=1", shell="exec {limi} 2> /dev/full").returncode == 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Trajectories that take long to pack."""
    lines = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    path = tmp_path_factory.mktemp("large") / "data.jsonl"
    with path.open("w") as file:
        for n in range(4000):
            record = lines[n % len(lines)] | {"id": f"{n}"}
            record["messages"][-1]["content"] = f"done, {n}"
            file.write(json.dumps(record) + "\n")
    return path


def packing(root, large, out, **streams):
    """The data stage with two workers, once these have begun."""
    words = ["data", f"cluster.root={root}", f"data.path={large}", f"data.out={out}", "data.workers=2"]
    process = subprocess.Popen([*LIMI, *words], cwd=REPO, preexec_fn=_attended, **streams)
    deadline = time.monotonic() + 60
    while len(psutil.Process(process.pid).children(recursive=True)) < 4:  # the forkserver, its tracker, two workers
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def _attended():
    """As from a shell of its own: SIGINT is ignored where tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("signals", ["SIGHUP", "SIGINT SIGINT SIGINT", "SIGTERM SIGINT SIGHUP"])
def test_signals_end_what_was_started_and_leave_nothing(root, bases, large, tmp_path, signals):
    process = packing(root, large, tmp_path / "out", stderr=subprocess.PIPE, start_new_session=True)
    started = psutil.Process(process.pid).children(recursive=True)
    for name in signals.split():
        os.killpg(process.pid, getattr(signal, name))  # as a terminal sends them, to all of the command
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "Interrupted; the same command goes on from what is whole: a data set, a checkpoint.\n"
    assert not alive(started)
    assert not list((tmp_path / "out").iterdir())


def test_a_terminal_that_closes_ends_the_command(root, bases, large, tmp_path):
    terminal, end = pty.openpty()

    process = packing(root, large, tmp_path / "out", stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    started = psutil.Process(process.pid).children(recursive=True)
    os.close(terminal)
    os.killpg(process.pid, signal.SIGHUP)  # which the kernel sends where the terminal is the session's
    assert process.wait(60) == 130
    assert not alive(started)
    assert not list((tmp_path / "out").iterdir())


def test_nohup_is_obeyed(root, bases, large, tmp_path):
    words = ["data", f"cluster.root={root}", f"data.path={large}", f"data.out={tmp_path}", "data.workers=1"]
    process = subprocess.Popen(["nohup", *LIMI, *words], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
