"""CI's share of the slow tests: `python -m tests.slow_shard RECORD SECONDS`, where RECORD is what `make test` recorded.

The number of commits chooses the share, so that every share has its turn. A share is whole modules, balanced by the seconds in
`slow_seconds.json`, which may be out of date; it begins with another module each time it comes round. What SECONDS cut is not run, and
never a failure. A test that fails is tried once more alone: it is FLAKY where it then passes. At the end comes what did not run, and
why, and on the last line the sum of both.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from recipes.paths import REPO
from tests.record import VARIABLE, Ran, read

SHARES = 6  # each takes less than CI has for one
SLOW, CONTRACT = "slow and not contract", "contract"
CLOCK = "the clock"
UNKNOWN_S = 20.0  # of a test in a module that the table does not know
GRACE_S = 20.0  # for the end of what the clock cuts
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Share:
    """Modules that run one after another until the time limit, and the outcomes of their tests."""

    folder: Path
    until: float  # of time.monotonic()
    ran: list[Ran] = field(default_factory=list)
    flaky: list[str] = field(default_factory=list)
    not_run: list[tuple[str, str]] = field(default_factory=list)  # test, why

    def run(self, modules: dict[str, list[str]]) -> None:
        for module, of_module in modules.items():
            started = time.monotonic()
            ran, why = self._pytest(module, "-m", SLOW)
            missing = [test for test in of_module if test not in {r.test for r in ran}]
            if missing and why is None:  # pytest itself died in a test
                ran.append(Ran(missing.pop(0), "failed", "", 0.0))
                why = "pytest died in a test before them"
            if why == CLOCK and ran and missing:
                print(f"ended by the clock: {missing[0]}", flush=True)
            self.not_run += [(test, str(why)) for test in missing]
            self.ran += [self._again(r) if r.outcome == "failed" else r for r in ran]
            if why is None:
                print(f"{module}: {time.monotonic() - started:.0f} s", flush=True)

    def _again(self, first: Ran) -> Ran:
        """Run a failed test once more, alone. If no time is left, the failure stands."""
        print(f"\ntried once more alone: {first.test}", flush=True)
        ran, _ = self._pytest(first.test)
        again = next((r for r in ran if r.test == first.test), first)
        if again.outcome == "passed":
            self.flaky.append(first.test)
        return again if again.outcome == "passed" else first

    def _pytest(self, *words: str) -> tuple[list[Ran], str | None]:
        """Run pytest. Return the tests that ran, and why the others did not."""
        left = self.until - time.monotonic()
        if left <= 0:
            return [], CLOCK
        with tempfile.TemporaryDirectory() as scratch:
            record = Path(scratch) / "record"
            env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
            env |= {VARIABLE: str(record), "PYTHONPATH": os.pathsep.join([str(REPO), env.get("PYTHONPATH", "")])}
            options = ["-p", "tests.record", "--durations=20", "--durations-min=0.5"]
            command = [sys.executable, "-m", "pytest", *options, *words]
            process = subprocess.Popen(command, cwd=self.folder, env=env)
            try:
                process.wait(left)
                why = None
            except subprocess.TimeoutExpired:
                why = CLOCK
            ran = read(record)  # before what the end of it makes fail
            end(process)
        return ran, why


def end(process: subprocess.Popen[bytes]) -> None:
    """End a pytest as Ctrl-C does, then every process that it left."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    left = psutil.Process().children(recursive=True)
    for one in left:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=GRACE_S)


def collected(folder: Path, marker: str) -> dict[str, list[str]]:
    """Return the tests with a marker, by module."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:cacheprovider", "-m", marker]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):  # 5: there are none
        sys.exit(done.stdout + done.stderr)
    found: dict[str, list[str]] = {}
    for test in done.stdout.splitlines():
        if "::" in test:
            found.setdefault(test.partition("::")[0], []).append(test)
    return found


def shares(modules: dict[str, list[str]], seconds: dict[str, float], count: int) -> list[list[str]]:
    """Return the modules in `count` shares of similar duration: the longest first, each to the shortest share so far."""
    takes = {module: seconds.get(module, UNKNOWN_S * len(some)) for module, some in modules.items()}
    made: list[list[str]] = [[] for _ in range(count)]
    for module in sorted(modules, key=lambda m: (-takes[m], m)):
        min(made, key=lambda share: sum(takes[m] for m in share)).append(module)
    return made


def mine(modules: dict[str, list[str]], seconds: dict[str, float], count: int, commits: int) -> dict[str, list[str]]:
    """Return the share, one of `count`, that this number of commits selects, rotated by its turn."""
    share = shares(modules, seconds, count)[commits % count]
    turn = commits // count % max(1, len(share))
    return {module: modules[module] for module in share[turn:] + share[:turn]}


def said(share: Share, before: Sequence[Ran], elsewhere: int, contract: int) -> Iterator[str]:
    """Yield the summary: what did not run and why, failures and flaky tests, and the totals with the tests before this share."""
    yield "\nnot run:"
    if elsewhere:
        yield f"  {tests(elsewhere)} of other shares"
    for (module, why), count in Counter((test.partition("::")[0], why) for test, why in share.not_run).items():
        yield f"  {tests(count)} of {module}: {why}"
    if contract:
        checkouts = "make test-contract SLIME_ROOT=FOLDER MEGATRON_ROOT=FOLDER"
        yield f"  {tests(contract)} of the contract with slime, which want its checkout and Megatron-LM's: {checkouts}"
    all_ran = [*before, *share.ran]
    for why, count in Counter(r.why for r in all_ran if r.outcome == "skipped").most_common():
        yield f"  {tests(count)} skipped: {why}"
    yield from (f"FLAKY {test}" for test in share.flaky)
    yield from (f"FAILED {r.test}" for r in all_ran if r.outcome == "failed")
    outcomes = Counter(r.outcome for r in all_ran)
    yield f"{outcomes['passed']} passed, {outcomes['failed']} failed, {outcomes['skipped']} skipped"


def tests(count: int) -> str:
    return f"{count} test{'s' * (count != 1)}"


def seconds_of(folder: Path) -> dict[str, float]:
    """Return the recorded seconds of each module."""
    table = folder / "tests" / "slow_seconds.json"
    found: dict[str, float] = json.loads(table.read_text()) if table.exists() else {}
    return found


def commits_of(folder: Path) -> int:
    done = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("record", type=Path)
    words.add_argument("seconds", type=float)
    words.add_argument("--folder", type=Path, default=REPO, help="of the tests")
    words.add_argument("--shares", type=int, default=SHARES)
    words.add_argument("--commits", type=int, help="in the place of the checkout's")
    given = words.parse_args()
    # What a test leaves running becomes this process's child.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    share, before = Share(given.folder, time.monotonic() + given.seconds), read(given.record)
    elsewhere = contract = 0
    if given.seconds <= 0 or any(r.outcome == "failed" for r in before):
        print("make test failed, or left no time: no slow test is run")
    else:
        modules = collected(given.folder, SLOW)
        commits = commits_of(given.folder) if given.commits is None else given.commits
        chosen = mine(modules, seconds_of(given.folder), given.shares, commits)
        print(f"slow tests, share {commits % given.shares + 1} of {given.shares}: {', '.join(chosen)}", flush=True)
        share.run(chosen)
        elsewhere = sum(len(some) for module, some in modules.items() if module not in chosen)
        if not (os.environ.get("SLIME_ROOT") and os.environ.get("MEGATRON_ROOT")):
            contract = sum(map(len, collected(given.folder, CONTRACT).values()))
    for line in said(share, before, elsewhere, contract):
        print(line)
    return int(any(r.outcome == "failed" for r in [*before, *share.ran]))


if __name__ == "__main__":
    sys.exit(main())
