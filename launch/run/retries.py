"""Restart a failed run at most `engine.max_retries` times, but not after the same failure twice in a row."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from launch.run import metrics
from recipes.config import Recipe
from recipes.errors import DivergedError, NodeLostError, TrainError

T = TypeVar("T")


def retrying(attempt: Callable[[], T], recipe: Recipe, run: Path, console: Console) -> T:
    """Call `attempt` until it succeeds, and return its result. Each retry resumes from the last complete checkpoint.

    Retry after a `TrainError`, but raise `DivergedError` and `NodeLostError` at once. Raise the `TrainError` if the retries are used
    up or the same step failed twice with the same message.
    """
    previous: tuple[int, str] | None = None
    for retry in itertools.count(1):
        try:
            return attempt()
        except (DivergedError, NodeLostError):
            raise
        except TrainError as error:
            first_line = str(error).splitlines()[0]
            failure = metrics.completed(run), re.sub(r"\d+", "", first_line)
            resume = "run the same command to go on from the last checkpoint"
            if failure == previous:
                raise TrainError(
                    f"{error}\nFailed twice with the same error after step {failure[0]}; not retrying", resume
                ) from error
            if retry > recipe.engine.max_retries:
                raise TrainError(
                    f"{error}\nengine.max_retries={recipe.engine.max_retries} are used up", resume
                ) from error
            console.print(f"{first_line}; retry {retry} of {recipe.engine.max_retries}", style="yellow")
            previous = failure
    raise AssertionError("an endless loop ended")
