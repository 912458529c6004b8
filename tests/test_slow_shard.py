"""CI's share of the slow tests, on folders of tests that pass, fail, flake, hang and die (`examples/`)."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recipes.paths import REPO
from tests.examples import environment, folder_of
from tests.slow_shard import mine, seconds_of, shares


def shard(folder: Path, *names: str, seconds: float = 100, before: str = "passed", words: tuple[str, ...] = ()):
    """The program on these modules, all of them one share, after a test that ended so."""
    record = folder / "record"
    line = {"test": "tests/test_it.py::test_it", "outcome": before, "why": "no reason", "seconds": 1.0}
    record.write_text(json.dumps(line) + "\n" if before else "")
    arguments = [str(record), str(seconds), "--folder", str(folder_of(folder, *names)), "--commits=0"]
    command = [sys.executable, "-m", "tests.slow_shard", *arguments, *(words or ("--shares=1",))]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.partition("not run:\n")[2].splitlines(), done.stdout + done.stderr


CONTRACT = (
    "  1 test of the contract with slime, which want its checkout and Megatron-LM's: make test-contract SLIME_ROOT=FOLDER "
    "MEGATRON_ROOT=FOLDER"
)


@pytest.mark.run
def test_the_slow_tests_run_and_the_sum_has_those_before(tmp_path):
    status, end, output = shard(tmp_path, "passing", before="skipped")
    assert status == 0, output
    assert end == [
        CONTRACT,
        "  1 test skipped: no reason",
        "  1 test skipped: no GPU here",
        "2 passed, 0 failed, 2 skipped",
    ]


@pytest.mark.run
def test_a_test_that_fails_is_tried_once_more_alone(tmp_path):
    status, end, output = shard(tmp_path, "failing")
    assert status == 1, output
    assert output.count("tried once more alone: ") == 3 and output.count("E       AssertionError: always\n") == 2, (
        output
    )
    assert end == [
        "FLAKY test_failing.py::test_flakes",
        "FLAKY test_failing.py::test_fails_after_others",
        "FAILED test_failing.py::test_fails",
        "4 passed, 1 failed, 0 skipped",
    ]


@pytest.mark.run
def test_what_the_clock_cuts_is_no_failure_and_nothing_is_left_of_it(tmp_path):
    status, end, output = shard(tmp_path, "hanging", "passing", seconds=8)
    assert status == 0, output
    assert "ended by the clock: test_hanging.py::test_hangs" in output
    assert end == [
        "  2 tests of test_hanging.py: the clock",
        "  3 tests of test_passing.py: the clock",
        CONTRACT,
        "2 passed, 0 failed, 0 skipped",
    ]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.run
def test_a_test_that_takes_pytest_with_it_has_failed(tmp_path):
    status, end, output = shard(tmp_path, "dying")
    assert status == 1, output
    assert end == [
        "  1 test of test_dying.py: pytest died in a test before them",
        "FAILED test_dying.py::test_dies",
        "2 passed, 1 failed, 0 skipped",
    ]


@pytest.mark.parametrize(
    ("before", "seconds", "says"),
    [
        ("failed", 100, ["FAILED tests/test_it.py::test_it", "0 passed, 1 failed, 0 skipped"]),
        ("passed", 0, ["1 passed, 0 failed, 0 skipped"]),
        ("", 0, ["0 passed, 0 failed, 0 skipped"]),
    ],
)
def test_where_make_test_failed_or_left_no_time_no_slow_test_is_run(tmp_path, before, seconds, says):
    status, end, output = shard(tmp_path, "passing", before=before, seconds=seconds)
    assert status == (before == "failed"), output
    assert "make test failed, or left no time: no slow test is run" in output
    assert end == says


@pytest.mark.run
def test_the_tests_of_other_shares_are_counted(tmp_path):
    status, end, output = shard(tmp_path, "passing", "hanging", words=("--shares=2", "--commits=1"))
    assert status == 0, output
    assert end[0] == "  3 tests of other shares" and end[-1] == "3 passed, 0 failed, 1 skipped", output


MODULES = {f"test_{name}.py": [f"test_{name}.py::test"] * n for n, name in enumerate("abcdefghij", start=1)}


def test_shares_hold_every_module_once_and_take_about_as_long():
    seconds = {"test_a.py": 900.0, "test_c.py": 300.0, "test_gone.py": 5000.0}  # the others: 20 s a test
    made = shares(MODULES, seconds, 3)
    assert sorted(module for share in made for module in share) == sorted(MODULES)
    assert made[0] == ["test_a.py"]
    takes = [sum(seconds.get(m, 20.0 * len(MODULES[m])) for m in share) for share in made]
    assert max(takes) <= 900 and max(takes[1:]) - min(takes[1:]) <= 60


def test_every_commit_takes_the_next_share_and_a_share_begins_with_another_module_each_time():
    found = [list(mine(MODULES, {}, 3, commits)) for commits in range(6)]
    assert sorted(module for share in found[:3] for module in share) == sorted(MODULES)
    for first, second in zip(found[:3], found[3:], strict=True):
        assert first != second == [*first[1:], first[0]]
    assert mine({}, {}, 3, 5) == {}


def test_the_table_of_seconds_is_of_modules_that_are_there():
    """It may be out of date without harm; what is gone is only in the way."""
    assert all((REPO / module).exists() for module in seconds_of(REPO))
