"""`make bench-gpu smoke=true`: check in a minute that all that training needs works on this GPU, and time attention's kernels.

Every check prints a figure with PASS or FAIL. On a machine without a GPU each runs with a stand-in, which proves only the checks
themselves.
"""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.files import write_text
from launch.bench.gpu.software import ENV, environment
from recipes.config import Recipe
from recipes.errors import TrainError

WORDS = {True: "PASS", False: "FAIL", None: "    "}


def smoke_gpu(recipe: Recipe, console: Console) -> None:
    """Run all checks and write `smoke.json`. Raise `TrainError` at the end if one failed."""
    os.environ |= ENV | dict(os.environ)
    from launch.megatron import cpu

    cpu.install()
    warnings.simplefilter("ignore")  # as in a rank's process
    from launch.bench.gpu.inputs import device_here
    from launch.bench.gpu.smoke import compiled_checks, copy_checks, kernel_checks, rank_checks
    from launch.bench.gpu.smoke.outcome import Bench, Outcome

    bench, started = Bench(device_here()), time.monotonic()
    versions = environment()
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if not bench.on_gpu:
        console.print("This machine has no GPU: stand-ins run in its place, and no figure below is a GPU's.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        beside = rank_checks.start_cpu_rank(bench, recipe, folder)
        checks: dict[str, Callable[[], Iterator[Outcome]]] = {
            "attention's kernels": lambda: kernel_checks.check_kernels(bench),
            "attention's speed": lambda: kernel_checks.race(bench, recipe),
            "compiled functions": lambda: compiled_checks.check_compiled(bench),
            "copies": lambda: copy_checks.check_copies(bench),
            "optimizer on the host": lambda: copy_checks.check_host_adam(bench),
            "collectives": lambda: copy_checks.check_collectives(bench),
            "loss": lambda: rank_checks.check_loss(bench),
            "checkpoint": lambda: rank_checks.check_checkpoint(bench, recipe, folder),
            "experts": lambda: rank_checks.check_experts(bench, recipe),
            "ranks": lambda: rank_checks.check_ranks(bench, recipe, folder, beside),
        }
        try:
            for name, check in checks.items():
                for outcome, seconds in _timed(name, check):
                    rows.append({"seconds": seconds, **vars(outcome)})
                    word = WORDS[outcome.passed]
                    console.print(f"{word}  {outcome.name}: {outcome.figure}  ({seconds:.1f} s)")
        finally:
            beside.kill()
            beside.wait()
    taken = time.monotonic() - started
    record = {"environment": versions, "seconds": taken, "checks": rows}
    path = Path(recipe.cluster.root) / "bench-gpu" / "smoke.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")
    failed = [row["name"] for row in rows if row["passed"] is False]
    passed = sum(row["passed"] is True for row in rows)
    console.print(f"{passed} passed, {len(failed)} failed in {taken:.0f} s; {path}")
    if failed:
        raise TrainError(f"{len(failed)} checks of this GPU failed: {', '.join(failed)}")


def _timed(name: str, check: Callable[[], Iterator[Any]]) -> Iterator[tuple[Any, float]]:
    """Yield the outcomes of a check, each with the seconds it took. An error is an outcome too, and the other checks still run."""
    from launch.bench.gpu.smoke.outcome import Outcome

    started = time.monotonic()
    try:
        for outcome in check():
            yield outcome, time.monotonic() - started
            started = time.monotonic()
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        yield Outcome(name, said, False), time.monotonic() - started


def smoke_table(record: dict[str, Any]) -> str:
    """Return a record of `smoke.json` as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    lines = [
        f"- **Software and GPU**: {versions}; {record['seconds']:.0f} s.",
        "",
        "| check | figure | |",
        "|---|---|---|",
    ]
    lines += [
        f"| {c['name']} | {c['figure'].replace('|', ' ')} | {WORDS[c['passed']].strip()} |" for c in record["checks"]
    ]
    return "\n".join(lines)
