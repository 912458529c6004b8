#!/usr/bin/env python3
"""The entry point of every stage: `launch/limi.py [STAGE] [name=value ...]`, STAGE one of those in `stages.py`, `train` by default.

It is also the entry point of a Ray job: `ray job submit --working-dir . -- launch/limi.py model=qwen3-tiny`. Inside a job it trains in
place. Exit status: 0 done, 1 a check failed or training ended early, 2 wrong input, 130 interrupted, 141 nobody reads the output.
"""

from __future__ import annotations  # so that an older Python can read this file and print its error

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

# Python puts this file's folder first on the path, but the packages are in the folder above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import python_environment  # noqa: E402
from recipes.errors import LimiError, PreflightError, SanityError, TrainError  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

    from launch.cli.stages import Stage

_INTERRUPTED = "Interrupted; the same command goes on from what is whole: a data set, a checkpoint."


def main(words: list[str]) -> int:
    failed = _failed(words)
    if failed is None:
        return 0
    if isinstance(failed, KeyboardInterrupt):
        _say(str(failed) or _INTERRUPTED, "yellow")
        return 130
    _say(f"{type(failed).__name__}: {failed}", "red")
    return 1 if isinstance(failed, (SanityError, TrainError)) else 2


def _failed(words: list[str]) -> LimiError | KeyboardInterrupt | None:
    """Run the stage. Return the error or interrupt that ended it early, or None."""
    try:
        python_environment.check_python(words)
        completed = python_environment.complete(words)
        from launch.cli import terminal

        with terminal.streams():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
                    signal.signal(number, _stop)
            _run(words, completed)
    except (LimiError, KeyboardInterrupt) as error:
        return error
    except ImportError as error:
        return python_environment.lacking(error, words)
    except MemoryError:
        return PreflightError(
            "this machine's memory is used up", "end other programs, or take a smaller model or data set"
        )
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nothing is left to interrupt
            signal.signal(number, signal.SIG_IGN)
    return None


def _run(words: list[str], completed: bool) -> None:
    """Run the command. completed: whether packages were brought for this Python, which every process of a job needs."""
    from rich.console import Console

    from launch.cli import command_line, stages, sweep

    name, overrides = command_line.parted(words)
    stage, console = stages.STAGES[name], Console(soft_wrap=True, markup=False, highlight=False)
    overrides, swept = sweep.parted(overrides)
    if swept is None:
        _run_stage(stage, overrides, completed, console)
    else:
        sweep.run_sweep(stage, overrides, swept, console, lambda one: _run_stage(stage, one, completed, console))


def _run_stage(stage: Stage, overrides: list[str], completed: bool, console: Console) -> None:
    """Run the stage once, on the recipe of these overrides. completed: see `_run`."""
    from launch.cli import dry_run, stages
    from launch.cluster.image import packages
    from launch.run.fetch_models import fetched
    from recipes.compose import os_errors
    from recipes.compose.recipe import compose_recipe

    recipe = None
    try:
        recipe = compose_recipe(overrides, stage.name)
        if completed:
            packages.bring(recipe.cluster.root)
        stages.refuse_anew(stage, recipe)
        stages.check_overrides(stage, recipe.overrides)
        if stage.name != "fetch":
            recipe = fetched(recipe)
        if recipe.dry_run:
            dry_run.show_dry_run(stage, recipe, console)
        else:
            stage.run(recipe, console)
    except OSError as error:
        raise os_errors.named(error, recipe) from error


def _say(text: str, style: str) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(text, file=sys.stderr)
    else:
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(text, style=style)


def _stop(number: int, frame: FrameType | None) -> None:
    """End a stage as Ctrl-C does, on SIGTERM (`ray job stop`) or SIGHUP (a closed terminal). The embedded engine saves a checkpoint
    first."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
