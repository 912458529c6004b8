"""A Ray of this machine: where its sockets can lie, what is tried again, and what is said where it cannot start."""

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from ray.exceptions import AuthenticationError

from launch.cluster import connection
from recipes.errors import PreflightError
from tests.conftest import REPO

START = """
import json, os, sys
import psutil, ray
from launch.cluster import connection, ray_errors
from recipes.errors import PreflightError

try:
    with connection.connected(num_cpus=1):
        folder = ray.get_runtime_context().get_temp_dir()
        said = {"folder": folder, "real": os.path.realpath(folder), "link": os.path.islink(folder)}
    said |= {"after": os.path.lexists(folder), "logs": str(ray_errors.logs())}
except PreflightError as error:
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    said = {"problem": error.problem, "fix": error.fix, "left": len(left)}
print(json.dumps(said))
"""


def start(**env):
    """What a process says that starts Ray with this in its environment, and its standard error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=REPO, env={**clean, **env}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def long(tmp_path):
    """A folder as those of Slurm's jobs, too long for a socket inside."""
    folder = tmp_path / ("job-" + "1234567890" * 6)
    folder.mkdir()
    return folder


@pytest.mark.run
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_starts_where_its_folder_is_too_long_for_a_socket(long, variable):
    said, _ = start(**{variable: str(long)})
    assert said["link"] and said["real"] == str(long / "ray"), "the logs stay where the user wants them"
    assert not said["after"], "the link is gone with Ray"
    assert list(Path(said["logs"]).glob("gcs_server*")) and said["logs"].startswith(str(long))


def test_a_folder_too_long_with_no_place_for_a_link_is_named_with_its_limit(long, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr(connection, "_SHORT", ("/proc/nowhere",))
    with pytest.raises(PreflightError) as error, connection._folder():
        pass
    assert f"'{long}'" in error.value.problem and "the limit is 107" in error.value.problem
    most = int(error.value.fix.split(" bytes")[0].split()[-1])
    assert connection._longest("/" + "x" * (most - 1) + "/ray") == 107, "what it asks for is just short enough"


def test_a_folder_that_can_be_used_is_used_as_it_is(tmp_path, monkeypatch):
    folder = Path("/tmp") / secrets.token_hex(4)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with connection._folder() as there:
        assert there == str(folder / "ray") and os.path.isdir(there)
    (folder / "ray").rmdir()
    folder.rmdir()


def test_a_folder_that_cannot_be_made_is_named_with_its_variable(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(PreflightError) as error, connection._folder():
        pass
    assert error.value.problem == "'/proc/nowhere': No such file or directory"
    assert error.value.fix == "set RAY_TMPDIR=FOLDER you can write to, before the command"


def test_a_full_disk_is_seen_before_ray_waits_for_what_cannot_come(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    full = connection.shutil.disk_usage("/")._replace(free=4_000_000)
    monkeypatch.setattr(connection.shutil, "disk_usage", lambda _: full)
    with (
        pytest.raises(PreflightError, match="has 4 MB free, but Ray needs 67 MB; make room there"),
        connection._folder(),
    ):
        pass


def test_a_start_that_takes_too_long_is_tried_again_and_leaves_nothing():
    """Ray gives its server no time: the time-out is its own."""
    said, err = start(RAY_gcs_server_port_wait_time_s="0")
    assert err.count("retrying, attempt") == 2, err
    assert said["problem"].startswith("Ray does not start: Timed out waiting for file ")
    assert said["problem"].endswith(" (3 times in 0 s)")
    assert said["fix"].startswith("stop other programs on this machine, or read its logs in ")
    assert said["left"] == 0


@pytest.mark.parametrize(
    ("port", "says"), [(None, "Address already in use"), ("seven", "it is not a port"), ("70000", "it is not a port")]
)
def test_a_port_that_cannot_be_had_is_named(monkeypatch, port, says):
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("RAY_GCS_SERVER_PORT", port or str(taken.getsockname()[1]))
        named = f"RAY_GCS_SERVER_PORT=.* cannot be used: {says}; unset it"
        with pytest.raises(PreflightError, match=named), connection.connected():
            pass


TEXTS = {  # what Ray 2.60 raises, and the words that are made of it
    "no raylet": (
        Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed to startup or the "
            "GCS has become overloaded."
        ),
        "GCS has become overloaded. (3 times in 0 s); stop other programs on this machine, or read its logs in",
    ),
    "another version": (
        RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.3\nThis process on node "
            "10.0.0.1:1234 was started with:\n    Ray: 2.49.1\n    Python: 3.11.7\n"
        ),
        "the cluster runs Ray 2.60.0 with Python 3.12.3, but this process runs Ray 2.49.1 with Python 3.11.7; start Ray on",
    ),
    "a cluster that is gone": (
        ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"),
        "no Ray answers at 10.0.0.1:6379; check that it runs (`ray status` on the head)",
    ),
    "a stale session": (
        ConnectionError(
            "Could not find any running Ray instance. Please specify the one to connect to by setting `--address` flag or "
            "`RAY_ADDRESS` environment variable."
        ),
        "no Ray answers; check that it runs",
    ),
    "a token": (AuthenticationError("Token authentication is enabled but no token"), "RAY_AUTH_TOKEN_PATH to a file"),
    "small shared memory": (
        ValueError(
            "The configured object store size (20.0 GB) exceeds /dev/shm size (0.067108864 GB). This will harm performance."
        ),
        "exceeds /dev/shm size (0.067108864 GB). This will harm performance.; make room in /dev/shm",
    ),
    "no room for the session": (
        OSError(28, "No space left on device", "/tmp/ray/session_1/logs"),
        "'/tmp/ray/session_1/logs': No space left on device; make room there",
    ),
    "anything else": (ValueError("Malformed host: "), "Ray does not start: Malformed host:; read its logs in "),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_what_ray_raises_has_words_that_mend_it(name, monkeypatch):
    raised, says = TEXTS[name]
    calls = []

    def init(**options):
        calls.append(options)
        raise raised

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(PreflightError) as error, connection.connected():
        pass
    assert says in str(error.value)
    assert error.value.fix
    assert len(calls) == (connection.TRIES if name == "no raylet" else 1)


def test_a_slow_start_that_then_comes_is_no_error(monkeypatch, capsys):
    """The second start is Ray's own."""
    real, calls = ray.init, []

    def init(**options):
        calls.append(1)
        if len(calls) == 1:
            subprocess.Popen(["sleep", "60"])  # what a start leaves behind
            raise RuntimeError("Timed out waiting for file /tmp/ray/session_1/gcs_server_port_1")
        running = [p.name() for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
        assert "sleep" not in running

    monkeypatch.setattr(ray, "init", init)
    with connection.connected():
        pass
    assert len(calls) == 2 and real is not ray.init
    assert "Timed out waiting for file" in capsys.readouterr().err
