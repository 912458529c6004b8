"""A sandbox in a process of its own: `python -m tests.launch.sanity.boxed waiting`, in which a call waits, the sandbox's process id
printed before it; `refused`, where the kernel gives no namespaces, and prints what is said of that."""

import sys
from pathlib import Path

from launch.sanity.loop import sandbox


def waiting() -> None:
    with sandbox.Sandbox({"a.py": "import time; time.sleep(99)"}) as box:
        print(box.pid, flush=True)
        box.call("run", {"command": "python a.py"})


def refused() -> None:
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    print(sandbox.available())
    try:
        sandbox.Sandbox({}).__enter__()
    except Exception as error:
        print(type(error).__name__)


if __name__ == "__main__":
    {"waiting": waiting, "refused": refused}[sys.argv[1]]()
