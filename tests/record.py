"""A pytest plugin, `-p tests.record`: appends a line of JSON per finished test to the file that LIMI_TEST_RECORD names."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest

VARIABLE = "LIMI_TEST_RECORD"
Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Ran:
    """The outcome of one test. why: the reason of a skip."""

    test: str
    outcome: Outcome
    why: str
    seconds: float


def read(path: Path) -> list[Ran]:
    """Return the tests recorded so far, without a line that is still being written."""
    text = path.read_text() if path.exists() else ""
    return [Ran(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def pytest_configure(config: pytest.Config) -> None:
    if VARIABLE in os.environ and not hasattr(
        config, "workerinput"
    ):  # a worker's reports reach the process that started it
        config.pluginmanager.register(_Recorder(Path(os.environ[VARIABLE])))


@dataclass(eq=False)  # pytest wants plugins that hash
class _Recorder:
    path: Path
    reports: dict[str, list[pytest.TestReport]] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reports = self.reports.setdefault(report.nodeid, [])
        reports.append(report)
        if report.when == "teardown":
            outcomes = {r.outcome for r in reports}
            outcome = next(o for o in ("failed", "skipped", "passed") if o in outcomes)
            why = next((_why(r) for r in reports if r.outcome == "skipped"), "")
            self._write(Ran(report.nodeid, outcome, why, sum(r.duration for r in reports)))
            del self.reports[report.nodeid]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a module that cannot be imported as failed."""
        if report.outcome == "failed":
            self._write(Ran(report.nodeid, "failed", "", 0.0))

    def _write(self, ran: Ran) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(ran)) + "\n")


def _why(report: pytest.TestReport) -> str:
    """Return the reason of a skip. pytest reports file, line and reason."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
