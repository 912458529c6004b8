"""`make bench` for the embedded engine on a CPU. It measures the tokens per second of every layout, memory, Ray's share of a step, the
start of `make train`, and checkpoints compared with a plain copy of their bytes. All files are written under a folder of
`cluster.root`.
"""

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.files import sync_tree
from data_prep.pack.dataset import prepare
from launch.bench import parity
from launch.megatron.ranks import Pool, Ranks
from launch.run.metrics import read_metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.weights import tiny
from recipes.compose.recipe import compose_recipe
from recipes.errors import TrainError
from recipes.layout import world_size
from recipes.paths import REPO

STDERR = Console(stderr=True)  # for the status line: the tables on standard output may go to a file
WARM, STEPS = 2, 5  # warm-up steps, and measured steps
CALLS = 100
ROUNDS = 5
STARTS = 3
TINY = ("qwen3-tiny", "glm4.5-tiny")
# 56 million parameters; the checkpoint has 16 bytes per parameter.
WIDE = ["model=qwen3-tiny", "model.hidden=768", "model.ffn=2304", "model.layers=10", "run=wide"]


def engine_rows(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield all rows but those of layouts: what is measured, the figure, and the target. root: the folder to write in."""
    return itertools.chain(model_rows(root), start_rows(root), checkpoint_rows(root))


def layout_rows(root: Path, names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the layout, its ranks, and the tokens per second of the median step. Layouts with as many ranks share their processes."""
    with Pool() as pool:
        for name in sorted(names, key=lambda name: parity.LAYOUTS[name][1]):
            with STDERR.status(name):
                plan = plan_of(root, parity.words_of(name), name.split()[0] + " untied" * ("untied" in name))
                with pool.ranks(plan) as ranks:
                    lines = _steps(ranks)
            yield name, str(plan.world_size), f"{statistics.median(n['tokens'] / n['seconds'] for n in lines):,.0f}"


def names_here() -> list[str]:
    """Return the names of the layouts that need no more ranks than this process has cores."""
    return [name for name, (_, ranks, _) in parity.LAYOUTS.items() if ranks <= len(os.sched_getaffinity(0))]


def model_rows(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield rows for the tiny models with their default recipes: seconds per step, memory of the largest rank, and Ray's share."""
    for model in TINY:
        plan = plan_of(root, [f"model={model}"], model)
        with STDERR.status(model), Ranks(plan.recipe) as ranks:
            ranks.build(plan)
            step = statistics.median(line["seconds"] for line in _steps(ranks))
            peak = max(ranks.call("peak_memory"))
            call = statistics.median(_seconds(lambda: ranks.call("peak_memory")) for _ in range(CALLS))
        yield f"{model}, {world_size(plan.recipe)} ranks: median step", f"{step:.3f} s", ""
        yield f"{model}: largest resident memory of a rank", f"{peak / 1e6:,.0f} MB", ""
        yield f"{model}: an empty call of all ranks", f"{call * 1e3:.1f} ms, {call / step:.1%} of a step", "at most 5%"


def start_rows(root: Path, rounds: int = STARTS) -> Iterator[tuple[str, str, str]]:
    """Yield the median seconds of `make train` up to its first step: in total, then by part. Base and data already exist."""
    plan_of(root, ["model=qwen3-tiny"], "qwen3-tiny")
    with STDERR.status("make train"):
        all_parts = [_start(root) for _ in range(rounds)]
    whole = statistics.median(sum(one.values()) for one in all_parts)
    yield "qwen3-tiny: `make train` to the end of the first step", f"{whole:.1f} s", ""
    for name in all_parts[0]:
        yield f"of it: {name}", f"{statistics.median(one[name] for one in all_parts):.1f} s", ""


def _start(root: Path) -> dict[str, float]:
    """Return the seconds of each part of a start, measured by the files that appear in the run folder. Then end the run."""
    run = root / "runs" / "start"
    shutil.rmtree(run, ignore_errors=True)
    metrics = run / "metrics.jsonl"
    parts: dict[str, Callable[[], bool]] = {
        "imports and data": (run / "config.yaml").exists,
        "plan": (run / "plan.json").exists,
        "ranks": metrics.exists,
        "held-out loss": lambda: len(read_metrics(metrics)) > 0,
        "first step": lambda: len(read_metrics(metrics)) > 1,
    }
    words = ["model=qwen3-tiny", f"model.checkpoint={root}/models/qwen3-tiny", f"cluster.root={root}", "run=start"]
    seconds: dict[str, float] = {}
    last = time.perf_counter()
    process = subprocess.Popen([sys.executable, "launch/limi.py", "train", *words], cwd=REPO, stdout=subprocess.DEVNULL)
    try:
        for name, reached in parts.items():
            while not reached():
                if process.poll() is not None:
                    raise TrainError(f"`make train {' '.join(words)}` ended with status {process.returncode}")
                time.sleep(0.01)
            seconds[name], last = time.perf_counter() - last, time.perf_counter()
    finally:
        process.terminate()
        process.wait()
    return seconds


def checkpoint_rows(root: Path, words: list[str] = WIDE, rounds: int = ROUNDS) -> Iterator[tuple[str, str, str]]:
    """Yield the median seconds of saves and loads, as training does them, and of a plain copy of the checkpoint's files. Ratios are
    medians of each round's ratio. No figure includes the removal of older checkpoints."""
    plan = plan_of(root, words, "wide")
    run = RunFolder(plan.recipe, plan.data, plan.heldout)
    saves, loads, copies = [], [], []
    with STDERR.status("checkpoint"), Ranks(plan.recipe) as ranks:
        ranks.build(plan)
        ranks.call("train_step", 0)  # creates Adam's moments

        def save(step: int) -> None:
            with run.new_checkpoint(step) as folder:
                ranks.call("save", str(folder), step)

        def load() -> None:
            checkpoint = run.open()[1]
            ranks.call("load", str(checkpoint))

        for step in range(
            1, rounds + 2
        ):  # the first does not count: it uses its memory and disk space for the first time
            for old in run.checkpoints():
                shutil.rmtree(old)
            saves.append(_seconds(partial(save, step)))
            checkpoint = run.checkpoints()[-1]
            copies.append(_seconds(partial(_copy, checkpoint, root / "copy")))
            shutil.rmtree(root / "copy")
            loads.append(_seconds(load))
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
    yield f"plain copy of a checkpoint of {size / 1e6:,.0f} MB, synced", f"{statistics.median(copies[1:]):.2f} s", "1"
    for name, seconds in (("save", saves), ("load", loads)):
        ratio = statistics.median(a / b for a, b in zip(seconds[1:], copies[1:], strict=True))
        yield f"{name}, with its SHA-256", f"{statistics.median(seconds[1:]):.2f} s, {ratio:.2f} ×", "at most 2 ×"


def plan_of(root: Path, words: list[str], base: str) -> Plan:
    """Return the plan of a recipe. Create its base model in `models/` of `root` under the name `base`, and pack its data."""
    recipe = compose_recipe([f"cluster.root={root}", f"model.checkpoint={root}/models/{base}", *words])
    tiny.make(recipe)
    return Plan(recipe, prepare(recipe, recipe.data.path), prepare(recipe, str(recipe.data.heldout)))


def _steps(ranks: Ranks) -> list[dict[str, Any]]:
    """Run all steps. Return `tokens` of each measured step, and `seconds` of its slowest rank."""
    steps = [ranks.call("train_step", step) for step in range(WARM + STEPS)][WARM:]
    return [
        {"tokens": by_rank[0]["tokens"], "seconds": max(one["time"]["step_s"] for one in by_rank)} for by_rank in steps
    ]


def _seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of `work` alone. Earlier writes are flushed to disk first."""
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    sync_tree(target)
