"""The plugin that records tests, in folders of which some have a conftest.py of their own, as here."""

import os
import subprocess
import sys

import pytest

from tests.examples import environment, folder_of
from tests.record import VARIABLE, read


@pytest.mark.run
def test_every_test_is_recorded_as_it_ended(tmp_path):
    folder, record = folder_of(tmp_path, "passing", "failing"), tmp_path / "record"
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "conftest.py").touch()
        os.rename(folder / f"test_{'passing' if name == 'a' else 'failing'}.py", folder / name / f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", "-p", "tests.record", "-p", "no:cacheprovider", "-q"]
    subprocess.run(command, cwd=folder, env=environment() | {VARIABLE: str(record)}, check=False)
    outcomes = {ran.test: ran.outcome for ran in read(record)}
    assert outcomes["a/test_a.py::test_quick"] == "passed"
    assert outcomes["b/test_b.py::test_fails"] == "failed"
