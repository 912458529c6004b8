"""Hostile calls, really made: each ends in a text within the deadline, with nothing left running and nothing outside touched."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.sanity.loop import sandbox
from launch.sanity.loop.sandbox import Limits, Sandbox
from recipes.errors import SanityError
from tests.conftest import REPO
from tests.launch.support import alive

pytestmark = pytest.mark.run

SHORT = Limits(seconds=3)
BOXED = [sys.executable, "-m", "tests.launch.sanity.boxed"]


@pytest.fixture
def box() -> Iterator[Sandbox]:
    """A sandbox that must be gone after the test, with all that ran in it, in time."""
    if why := sandbox.available():
        pytest.skip(why)
    with Sandbox({"notes.txt": "oak\n"}, SHORT) as box:
        started = time.monotonic()
        yield box
        assert time.monotonic() - started < 30
        inside = psutil.Process(box.pid).children(recursive=True)
        assert len(inside) == 1  # the first process alone: calls leave nothing behind
        outside = psutil.Process(box.pid)
    assert not alive([outside, *inside])


def run(box: Sandbox, script: str) -> str:
    assert box.call("write_file", {"path": "try.py", "content": script}) == "ok"
    started = time.monotonic()
    text = box.call("run", {"command": "python try.py"})
    assert time.monotonic() - started < SHORT.seconds + 10
    return text


def tried(box: Sandbox, expression: str) -> str:
    """What a script prints that evaluates an expression: its value, or the name of its error."""
    return run(
        box,
        f"import ctypes, os, socket, sys\ntry:\n    print(repr({expression}))\nexcept OSError as e:\n    print(e.strerror)",
    )


def test_tools_work_and_the_folder_stays_between_calls(box):
    assert box.call("read_file", {"path": "notes.txt"}) == "oak"
    assert box.call("write_file", {"path": "a/b.txt", "content": "Grüße"}) == "ok"
    assert box.call("list_files", {"path": "."}) == "a/\nnotes.txt"
    assert run(box, "print(open('a/b.txt').read(), end='')") == "Grüße"
    assert set(box.state()) == {"notes.txt", "a/b.txt", "try.py"}


@pytest.mark.parametrize("path", ["../..", "/etc/shadow", "/", "../scratch/notes.txt", "/proc/self/environ"])
def test_tools_refuse_paths_outside(box, path):
    assert box.call("read_file", {"path": path}).startswith("error: outside the folder")
    assert box.call("write_file", {"path": path, "content": "x"}).startswith("error: outside the folder")


@pytest.mark.parametrize(
    "path",
    ["/etc/shadow", "/etc/passwd", "/home", "/tmp", "/proc/1/environ", "/proc/self/exe", "/sys", "/dev/mem", str(REPO)],
)
def test_a_script_sees_nothing_of_the_machine(box, path):
    assert tried(box, f"os.stat({path!r})") == "No such file or directory"


def test_of_the_home_folder_a_script_sees_the_interpreter_alone(box):
    python = Path(os.path.realpath(sys.base_prefix))
    for folder in python.parents:
        inside = tried(box, f"os.listdir({str(folder)!r})")
        wanted = {
            Path(path).relative_to(folder).parts[0] for path in sandbox.readable() if Path(path).is_relative_to(folder)
        }
        assert set(eval(inside)) == wanted | ({"dev", "scratch"} if folder == Path("/") else set())


def test_only_the_folder_can_be_written(box):
    for path in ("/x", "/dev/x", f"{sys.base_prefix}/x", "/usr/lib/x", "/lib/x"):
        assert tried(box, f"open({path!r}, 'w')") == "Read-only file system"
    assert tried(box, f"os.chmod({os.path.realpath(sys.base_prefix)!r}, 0o777)") == "Read-only file system"
    assert not Path(sys.base_prefix, "x").exists()


def test_links_made_by_an_earlier_call_lead_nowhere(box):
    assert tried(box, "(os.symlink('/etc', 'etc'), os.symlink('../../..', 'up'))") == "(None, None)"
    assert box.call("read_file", {"path": "etc/shadow"}) == "error: outside the folder: etc/shadow"
    assert box.call("list_files", {"path": "up"}) == "error: outside the folder: up"
    assert tried(box, "open('etc/shadow').read()") == "No such file or directory"
    library = os.path.realpath(os.__file__)
    assert tried(box, f"os.link({library!r}, 'hard')") == "Invalid cross-device link"
    assert box.state()["etc"] == "a link"


def test_no_rights_and_none_to_be_had(box):
    assert tried(box, "(os.getresuid(), os.getresgid())") == str(((65534,) * 3, (65534,) * 3))
    status = Path(f"/proc/{psutil.Process(box.pid).children()[0].pid}/status").read_text()
    assert {line.split()[1] for line in status.splitlines() if line.startswith("Cap") and "Bnd" not in line} == {
        "0" * 16
    }
    assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
    assert tried(box, "os.setuid(0)") == tried(box, "os.chroot('.')") == "Operation not permitted"
    calls = {"mount": "b'x', b'x', b'tmpfs', 0, None", "unshare": "0x10000000", "ptrace": "16, 1, 0, 0",
             "memfd_create": "b'x', 0", "shmget": "0, 4096, 0o1600"}  # fmt: skip
    for name, arguments in calls.items():
        script = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{name}({arguments}), ctypes.get_errno())"
        assert run(box, script) == "-1 1", name


def test_no_user_namespace_inside_this_one(box):
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    script = f"import ctypes\nprint(ctypes.CDLL(None).syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0))"
    assert run(box, script) == "-1"


def test_no_network(box):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for address in (("127.0.0.1", port), ("1.1.1.1", 53)):
            assert tried(box, f"socket.create_connection({address!r}, 1)") == "Operation not permitted"
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()
    for kind in (
        "net",
        "mnt",
        "pid_for_children",
        "user",
        "ipc",
        "uts",
    ):  # sockets are refused, and there is no network either
        assert os.readlink(f"/proc/{box.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    devices = Path(f"/proc/{box.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in devices] == ["lo"]
    assert not Path(f"/proc/{box.pid}/net/route").read_text().splitlines()[1:]


def test_nothing_is_inherited(box, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        with Sandbox({}) as other:
            assert "SECRET" not in tried(other, "dict(os.environ)")
            script = "import os\nfor n in range(64):\n    try:\n        os.fstat(n)\n        print(n)\n    except OSError: pass"
            assert run(other, script) == "0\n1\n2"
            assert tried(other, "sys.stdin.read() == ''") == "True"
            first = psutil.Process(other.pid).children()[0]
            assert {os.readlink(f"/proc/{first.pid}/fd/{n}").split(":")[0] for n in (0, 1)} == {"pipe"}
            assert first.environ() == {}


def test_a_fork_bomb(box):
    assert Limits().processes == 16
    text = run(box, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert text == "error: timed out after 3 s"
    assert box.call("read_file", {"path": "notes.txt"}) == "oak"


def test_processes_at_a_time(box):
    fork = "        pids.append(os.fork())\n        if not pids[-1]: time.sleep(9)\n"
    script = f"import os, time\npids = []\ntry:\n    while True:\n{fork}except OSError: print(len(pids))\n"
    assert 8 <= int(run(box, script + "for pid in pids: os.kill(pid, 9)")) <= Limits().processes


def test_an_endless_command(box):
    assert run(box, "while True: pass") == "error: timed out after 3 s"
    assert run(box, "import time; time.sleep(1000)") == "error: timed out after 3 s"
    assert run(box, "print('next')") == "next"


def test_cpu_time():
    with Sandbox({}, Limits(seconds=8, cpu_seconds=1)) as box:
        box.call("write_file", {"path": "try.py", "content": "while True: pass"})
        # Ended by its own signal, and not by the seconds that a call may take.
        assert box.call("run", {"command": "python try.py"}).startswith("error: exit -")


def test_gigabytes_of_output(box):
    before = psutil.Process().memory_info().rss
    assert run(box, "import sys\nwhile True: sys.stdout.write('x' * 1_000_000)") == "error: too much output"
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_file_of_10_gb_and_a_folder_of_many(box):
    assert tried(box, "open('big', 'w').truncate(10_000_000_000)") == "File too large"
    script = "with open('big', 'wb') as f:\n    while True: f.write(bytes(1_000_000))"
    assert "File too large" in run(box, script)
    fill = "for n in range(99): open(f'big{n}', 'wb').write(bytes(4_000_000))"
    assert "No space left on device" in run(box, fill)
    assert box.call("write_file", {"path": "more", "content": "x" * 100_000}) == "error: No space left on device"


def test_many_files(box):
    assert "No space left on device" in run(box, "for n in range(999): open(f'f{n}', 'w')")
    assert len(box.state()) < 256


def test_memory(box):
    assert "MemoryError" in run(box, "x = bytearray(1_000_000_000)")


@pytest.mark.parametrize("number", [9, 15, 19])
def test_killing_the_parent_and_all_others(box, number):
    script = f"import os\nfor pid in (os.getppid(), 1, -1):\n    try: os.kill(pid, {number})\n    except OSError as e: print(e)"
    assert run(box, script).startswith("error: ")
    assert box.call("read_file", {"path": "notes.txt"}) == "oak"
    assert run(box, "print('next')") == "next"


def test_a_daemon_does_not_outlive_its_call(box):
    daemon = "import os, time\nif not os.fork():\n    os.setsid()\n    for n in (0, 1, 2): os.close(n)\n    while not os.fork():\n"
    daemon += "        open('alive', 'a').write('x')\n        time.sleep(0.05)\n"
    run(box, daemon)
    before = box.state().get("alive")
    time.sleep(0.5)
    assert box.state().get("alive") == before


def test_a_pipe_in_place_of_a_file(box):
    assert tried(box, "os.mkfifo('pipe')") == "None"
    assert box.call("read_file", {"path": "pipe"}) == "error: no such file: pipe"
    assert box.state()["pipe"] == "neither file nor folder"


@pytest.mark.parametrize("name", ["bash", "", "__import__", None, 3])
def test_unknown_tools_and_arguments_that_are_none(box, name):
    assert box.call(name, {"command": "ls"}).startswith("error: unknown tool")
    assert box.call("read_file", "not JSON") == "error: arguments must be an object"


def test_it_ends_with_a_caller_that_is_killed():
    caller = subprocess.Popen([*BOXED, "waiting"], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    outside = psutil.Process(int(caller.stdout.readline()))
    time.sleep(0.5)
    inside = outside.children(recursive=True)
    assert len(inside) == 3  # the first process, the call's, the script's
    caller.kill()
    caller.communicate()
    assert not alive([outside, *inside])


def test_where_the_kernel_refuses_nothing_is_run():
    words = ["unshare", "--user", "--map-root-user", *BOXED, "refused"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.splitlines() == [
        "the sandbox of tool calls: unshare: No space left on device", SanityError.__name__
    ], done.stderr  # fmt: skip


def test_a_call_after_the_end_is_refused():
    box = Sandbox({})
    with pytest.raises(SanityError, match="has ended"):
        box.call("list_files", {"path": "."})
