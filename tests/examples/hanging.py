"""Slow tests, of which the second never ends, with a process in a session of its own, and would fail if it were interrupted."""

import subprocess
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_before() -> None:
    pass


@pytest.mark.slow
def test_hangs() -> None:
    wait = ["sleep", "600"]
    Path("pid").write_text(str(subprocess.Popen(wait, start_new_session=True).pid))
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        raise AssertionError("interrupted") from None


@pytest.mark.slow
def test_after() -> None:
    pass
