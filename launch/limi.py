#!/usr/bin/env python3
"""The entry point of every stage: `launch/limi.py [STAGE] [name=value ...]`, STAGE one of those in `stages.py`, `train` by default.

The same file is a Ray job's entry point: `ray job submit --working-dir . -- launch/limi.py model=qwen3-tiny`. Inside a
job it trains in place. Exit status: 0 done, 1 a check failed or training ended early, 2 the input is wrong, 130
interrupted.
"""

import errno
import signal
import sys
from pathlib import Path
from types import FrameType

# Python puts this file's folder first on the path; the packages are one above it.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console  # noqa: E402

from recipes.errors import LimiError, SanityError, TrainError  # noqa: E402

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, _stop)
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        from launch import command_line, dry_run, stages
        from launch.fetch import fetched
        from recipes.compose import compose_recipe

        name, overrides = command_line.parted(words)
        stage = stages.STAGES[name]
        recipe = compose_recipe(overrides, name)
        stages.refuse_anew(stage, recipe)
        if stage is not stages.fetch:
            recipe = fetched(recipe)
        console = Console(soft_wrap=True, markup=False, highlight=False)
        if recipe.dry_run:
            dry_run.show(stage, recipe, console)
        else:
            stage(recipe, console)
    except LimiError as error:
        errors.print(f"{type(error).__name__}: {error}", style="red")
        return 1 if isinstance(error, SanityError | TrainError) else 2
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        errors.print(f"PreflightError: {error}; make room or write cluster.root=FOLDER you can write to", style="red")
        return 2
    except KeyboardInterrupt as interrupt:
        errors.print(
            str(interrupt) or "Interrupted; the same command goes on from what is whole: a data set, a checkpoint.",
            style="yellow",
        )
        return 130
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM, as `ray job stop` sends it, ends a stage as Ctrl-C does, everything started here first; the embedded engine saves."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
