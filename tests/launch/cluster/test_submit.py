"""A run as a job of a Ray cluster: submitted, watched, left, found again, stopped and gone on with."""

import contextlib
import http.server
import io
import os
import pty
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from launch.cluster.upload import check_size
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, PreflightError
from tests.conftest import REPO
from tests.launch.support import UNJUDGED, called, limi, metrics_of, ray_cluster

# 120 steps; a model that learns nothing makes no calls, and so none for the sanity check to find wrong.
SHORT = [
    "optim.epochs=24", "optim.lr=1e-9", *UNJUDGED, "cluster.nodes=2", "cluster.gpus_per_node=1"
]  # fmt: skip


class Terminal:
    """The command line on a terminal of its own."""

    def __init__(self, *words):
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(REPO)
            os.execv(sys.executable, [sys.executable, "launch/limi.py", *words])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)  # what still runs there is hung up

    def until(self, text, times=1, patience=120):
        """Reads until `text` was shown so often."""
        deadline = time.monotonic() + patience
        while self.shown.count(text) < times:
            assert time.monotonic() < deadline, f"'{text}' never came: {self.shown}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode()
                except OSError as error:  # the terminal's other end is closed
                    raise AssertionError(f"ended without '{text}': {self.shown}") from error

    def types(self, keys):
        os.write(self.fd, keys.encode())

    def status(self):
        """Its exit status, everything read."""
        with contextlib.suppress(OSError):
            while text := os.read(self.fd, 65536).decode():
                self.shown += text
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one core."""
    with ray_cluster(tmp_path_factory.mktemp("cluster"), nodes=2, cpus=1) as made:
        yield made


def wait_for_step(run, step):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            if metrics_of(run)[-1]["step"] >= step:
                return
        time.sleep(0.1)
    raise AssertionError(f"step {step} never came")


@pytest.mark.slow
def test_a_run_is_submitted_left_found_stopped_and_gone_on_with(cluster):
    root, at = cluster.home / "root", f"cluster.address={cluster.address}"
    run = root / "runs" / "sent"
    words = ["model=qwen3-tiny", "run=sent", f"cluster.root={root}", at, *SHORT]
    with Terminal("train", *words) as submitted:
        submitted.until("step 12/120")

        again = limi("train", *words)
        assert again.returncode == 2
        assert f"`make attach run=sent {at}`" in again.stderr and f"`make stop run=sent {at}`" in again.stderr

        submitted.types("\x03")
        submitted.until("[d]etach")
        submitted.types("g\n")
        submitted.until("watching job")
        submitted.types("\x03")
        submitted.until("[d]etach", 2)
        submitted.types("\x03")
        assert submitted.status() == 130
        assert "goes on; `make attach run=sent" in submitted.shown
        assert submitted.shown.count("step 12/120") == submitted.shown.count("steps on 2 ranks") == 1

    attached = subprocess.Popen(
        [sys.executable, "launch/limi.py", "attach", "run=sent", at], cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    stopped = limi("stop", "run=sent", at)
    assert stopped.returncode == 0, stopped.stderr
    assert "has ended: STOPPED" in stopped.stdout
    log, _ = attached.communicate(timeout=60)
    assert attached.returncode == 130
    assert "steps on 2 ranks" in log and "SIGTERM: saved after step" in log and "was stopped" in log
    assert limi("stop", "run=sent", at).stdout.endswith("had already ended: STOPPED\n")

    with Terminal("train", *words) as resumed:
        resumed.until("going on from")
        step = metrics_of(run)[-1]["step"]
        wait_for_step(run, step + 1)
        resumed.types("\x03")
        resumed.until("[d]etach")
        resumed.types("s\n")
        assert resumed.status() == 130
        assert "SIGTERM: saved after step" in resumed.shown and "was stopped" in resumed.shown

    ended = limi("train", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "going on from" in ended.stdout and "steps on 2 ranks" in ended.stdout
    assert (run / "report.html").is_file()
    shown = limi("attach", "run=sent", at)
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[1:] == ended.stdout.splitlines()[1:]
    left = subprocess.run(["pgrep", "-f", "launch/limi.py train .*run=sent"], capture_output=True, text=True).stdout
    assert not left


@pytest.mark.slow
def test_without_a_terminal_an_interrupt_detaches(cluster):
    root, at = cluster.home / "root", f"cluster.address={cluster.address}"
    words = ["run=unwatched", f"cluster.root={root}", at, *SHORT]
    watcher = subprocess.Popen(
        [sys.executable, "launch/limi.py", "train", *words], cwd=REPO, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        wait_for_step(root / "runs" / "unwatched", 2)
        watcher.send_signal(signal.SIGINT)
        log, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert watcher.returncode == 130 and "goes on; `make attach run=unwatched" in log
    assert "has ended: STOPPED" in limi("stop", "run=unwatched", at).stdout


class Proxy:
    """Passes connections on to a port of this machine, until it is told to cut them."""

    def __init__(self, port):
        self.port, self.pairs, self.server = port, [], socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                pair = self.server.accept()[0], socket.create_connection(("127.0.0.1", self.port))
                self.pairs.append(pair)
                for a, b in (pair, pair[::-1]):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    def _pass(self, a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def cut(self):
        while self.pairs:
            for end in self.pairs.pop():
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_log_whose_stream_breaks_is_shown_once_and_whole(cluster):
    from launch.cluster.jobs import RUN, STOP_S, Log, connect

    proxy = Proxy(int(cluster.address.rpartition(":")[2]))
    client = connect(compose_recipe([f"cluster.address={proxy.address}"]))
    lines = REPO / "tests" / "launch" / "lines.py"
    for _ in range(30):
        with contextlib.suppress(RuntimeError):  # no agent yet
            job = client.submit_job(
                entrypoint=f"python3 {shlex.quote(str(lines))}", metadata={RUN: "lines", STOP_S: "3"}
            )
            break
    stream = io.StringIO()
    cuts = [threading.Timer(s, proxy.cut) for s in (3, 6, 6.5, 9)]
    for cut in cuts:
        cut.start()
    ended = Log(client, job, Console(file=stream)).follow()
    proxy.server.close()
    assert ended.status == "SUCCEEDED"
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(120)]


@pytest.mark.slow
def test_a_cluster_with_a_token_and_a_job_that_fails(tmp_path, monkeypatch):
    token, empty = tmp_path / "token", tmp_path / "empty"
    token.write_text("0123456789abcdef" * 4)
    empty.mkdir()
    with ray_cluster(tmp_path, cpus=1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)) as cluster:
        monkeypatch.setenv("HOME", str(empty))
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the recipe's address holds, not this one
        at, path = f"cluster.address={cluster.address}", "/no where/it's [1] $HOME.jsonl"
        refused = limi("attach", "run=failing", at)
        assert refused.returncode == 2 and "asks for a token, but this machine has none" in refused.stderr
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        assert "no run has one: `make train` submits one" in limi("attach", "run=failing", at).stderr
        failed = limi("train", "run=failing", at, f"cluster.root={tmp_path}/root", f"data.path={path}")
        assert failed.returncode == 1
        assert "TrainError: job failing-" in failed.stderr and f"no file '{path}'" in failed.stderr
        assert failed.stdout.count(f"no file '{path}'") == 1
        unknown = limi("stop", "run=other", at)
        assert unknown.returncode == 2 and "write run=NAME with one of failing" in unknown.stderr


@contextlib.contextmanager
def page():
    """A server that is not Ray's."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def silent():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (nothing, "does not answer"),
        pytest.param(silent, "does not answer", marks=pytest.mark.slow),
        (page, "but it is not Ray's dashboard"),
    ],
)
def test_an_address_without_a_cluster(tmp_path, server, says):
    with server() as port:
        started = time.monotonic()
        done = called("train", f"cluster.address=http://127.0.0.1:{port}", f"cluster.root={tmp_path}")
    assert done.returncode == 2
    assert f"cluster.address=http://127.0.0.1:{port} " in done.stderr and says in done.stderr
    assert time.monotonic() - started < 25
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "http://", "http://head:8265/#/jobs"])
def test_what_is_no_dashboards_address_is_refused(address):
    with pytest.raises(ConfigError, match="write cluster.address=http://HEAD:8265"):
        compose_recipe([f"cluster.address={address}"])


@pytest.mark.parametrize("stage", ["attach", "stop"])
def test_a_job_is_looked_for_where_the_recipe_says(stage):
    done = called(stage, "run=sent")
    assert done.returncode == 2 and "write cluster.address=http://HEAD:8265" in done.stderr


def test_a_checkout_too_large_to_send_is_refused_with_its_largest_paths(tmp_path):
    for name, mb in {"weights/model.bin": 90, "env/lib/a.so": 10, "env/lib/b.so": 10, "small.py": 1}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, mb * 10**6)
    with pytest.raises(PreflightError, match=r"has 111 MB .*weights/model.bin \(90 MB\), \S+/env/lib \(20 MB\): move"):
        check_size(tmp_path)
    (tmp_path / ".rayignore").write_text("/env/\n")
    check_size(tmp_path)


def test_this_checkout_can_be_sent():
    check_size(REPO)
