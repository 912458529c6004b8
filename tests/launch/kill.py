"""Kills at random moments, and what they cost: `python -m tests.launch.kill [KILLS]` prints the table.

A run is a whole one: base, data, training, saves every other step, export. Each kill is SIGKILL to a rank, the driver, Ray's
raylet or its GCS, after a time drawn at random; a command that ends is given again. After five kills a run is left alone to its
end, and then its metrics and weights must be the uninterrupted run's, bit for bit.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from data_prep.files import sha256
from tests.launch.support import alive, descendants, finish, metrics_of, start

WORDS = ["run=kills", "engine.save_steps=2", "engine.keep_last=2", "engine.timeout=60"]
TARGETS = {"rank": "ray::Worker", "driver": "", "raylet": "raylet/raylet", "gcs": "gcs_server"}
KILLS_A_RUN = 5
SHARE = 0.6  # of an uninterrupted run, between a start or a kill and the next kill at most
PATIENCE_S = 120.0  # after which nothing may be left; Ray's helpers take a minute to notice that a driver was killed


@dataclass
class Outcome:
    """Kills by target and by what the run was doing; runs completed, and of them those whose metrics and weights are the
    uninterrupted run's; every process that was started, and those of them left at the end."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    runs: int = 0
    equal: int = 0
    started: set[psutil.Process] = field(default_factory=set)
    left_over: list[str] | None = None

    def table(self) -> str:
        phases = sorted({phase for _, phase in self.kills})
        lines = [f"| killed in | {' | '.join(phases)} |", f"|---|{'---|' * len(phases)}"]
        lines += [f"| {t} | {' | '.join(str(self.kills[t, p]) for p in phases)} |" for t in TARGETS]
        lines.append(
            f"{self.kills.total()} kills in {self.runs} runs; {self.equal} runs equal the uninterrupted one, metrics and weights bit "
            "for bit"
        )
        if self.left_over is not None:
            lines.append(f"left over: {', '.join(self.left_over) or 'nothing'}")
        return "\n".join(lines)


def result(root: Path) -> tuple[list[dict], dict[str, str]]:
    """Metrics without timings, and hashes of the export's files."""
    run = root / "runs" / "kills"
    return metrics_of(run), {p.name: sha256(p) for p in (run / "hf").iterdir()}


def phase(root: Path) -> str:
    """What a run is doing, by its folder."""
    run = root / "runs" / "kills"
    if not run.is_dir():
        return "data"
    if any(run.glob("checkpoints/.step_*")):
        return "save"
    if any(run.glob(".hf.*")) or (run / "hf").exists():
        return "export"
    return "step" if (run / "metrics.jsonl").exists() else "start"


def kill(process: subprocess.Popen[str], target: str, rng: random.Random) -> bool:
    """Whether there was one to kill."""
    found = [psutil.Process(process.pid)] if target == "driver" else _called(TARGETS[target], process.pid)
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        os.kill(rng.choice(found).pid, signal.SIGKILL)
        return True
    return False


def _called(name: str, pid: int) -> list[psutil.Process]:
    found = []
    for p in descendants(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(p.cmdline()):
                found.append(p)
    return found


def run_of_kills(root: Path, duration: float, most: int, rng: random.Random, outcome: Outcome) -> None:
    """One run to its end, killed `most` times at most on its way."""
    done = 0
    while True:
        process = start(root, *WORDS)
        while done < most:
            time.sleep(rng.uniform(0, SHARE * duration))
            if process.poll() is not None:
                break
            outcome.started.update(descendants(process.pid))
            doing, target = phase(root), rng.choice(list(TARGETS))
            if kill(process, target, rng):
                outcome.kills[target, doing] += 1
                done += 1
            if target == "driver":
                break
        code, output = finish(process)
        if code == 0:
            return
        if "Error" in output and "TrainError" not in output and "CheckpointError" not in output:
            print(output)


def run(kills: int, seed: int = 0) -> Iterator[Outcome]:
    """The outcome so far, after every run."""
    rng, outcome = random.Random(seed), Outcome()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        code, output = finish(start(whole, *WORDS))
        assert code == 0, output
        duration, expected = time.monotonic() - started, result(whole)
        while outcome.kills.total() < kills:
            root = Path(folder) / f"run{outcome.runs}"
            run_of_kills(root, duration, min(KILLS_A_RUN, kills - outcome.kills.total()), rng, outcome)
            outcome.runs += 1
            outcome.equal += result(root) == expected
            yield outcome
        outcome.left_over = [p.name() for p in alive(list(outcome.started), PATIENCE_S)]
        yield outcome


if __name__ == "__main__":
    for outcome in run(int(sys.argv[1]) if len(sys.argv) > 1 else 50):
        print(outcome.table(), flush=True)
