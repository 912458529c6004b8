"""A plugin that keeps quick tests quick: a test without a marker fails if it starts Ray, a server or a training."""

import os
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

MARKERS = ("run", "slow", "contract")
RAY = {"ray", "raylet", "gcs_server"}
SERVERS = {"sglang.launch_server", "fake_server.py"}
COMMANDS = {"limi.py", "train_only.py", "make"}
# Stages that train, serve or measure.
WHOLE = {"train", "rehearse", "replay", "sanity", "serve", "parity", "bench", "bench-gpu"}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Guard())


class Guard:
    """The plugin. test: the test that is running."""

    test: pytest.Item | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        Guard.test = item
        try:
            return (yield)
        finally:
            Guard.test = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Any:
        started = subprocess.Popen.__init__

        def start(process: Any, args: Any, *others: Any, **named: Any) -> None:
            words = [args] if isinstance(args, str | bytes | os.PathLike) else args
            if what := starts([os.fsdecode(word) for word in words]):
                wants("run", f"starts {what}")
            started(process, args, *others, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess.Popen, "__init__", start)
            return (yield)


def starts(words: Sequence[str]) -> str | None:
    """Return what this command starts that a quick test may not start, or None."""
    names = [os.path.basename(word) for word in words]
    if RAY & {*names[:1]}:
        return "Ray"
    if SERVERS & {*names}:
        return "a server"
    command = next((n for n, name in enumerate(names) if name in COMMANDS), None)
    if command is None or "dry_run=true" in words or "-n" in words:
        return None
    stage = next((word for word in words[command + 1 :] if "=" not in word), None)
    if stage is None and names[command] != "make":
        stage = "train"
    return f"`{names[command]} {stage}`" if stage in WHOLE else None


def wants(marker: str, does: str) -> None:
    """Fail the running test if it has neither this marker nor one of a longer kind."""
    test = Guard.test
    if test is not None and not any(test.get_closest_marker(name) for name in MARKERS[MARKERS.index(marker) :]):
        # No test's own `except Exception` catches it.
        pytest.fail(f"{test.nodeid} {does}, which a quick test may not; mark it with @pytest.mark.{marker}")
