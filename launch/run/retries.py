"""Starting a run again after it failed: at most `engine.max_retries` times, and not where it fails in the same way again."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from launch.run import metrics
from recipes.config import Recipe
from recipes.errors import DivergedError, TrainError

T = TypeVar("T")


def retrying(attempt: Callable[[], T], recipe: Recipe, run: Path, console: Console) -> T:
    """What `attempt` returns, called again after a `TrainError`, each time from the last whole checkpoint.

    Raises `DivergedError` at once, and the `TrainError` where the retries are used up or the same step failed in the same way
    twice.
    """
    before: tuple[int, str] | None = None
    for retry in itertools.count(1):
        try:
            return attempt()
        except DivergedError:
            raise
        except TrainError as error:
            first = str(error).splitlines()[0]
            failure = metrics.completed(run), re.sub(r"\d+", "", first)
            again = "run the same command to go on from the last checkpoint"
            if failure == before:
                raise TrainError(
                    f"{error}\nAfter step {failure[0]} twice, so it was not tried a third time", again
                ) from error
            if retry > recipe.engine.max_retries:
                raise TrainError(
                    f"{error}\nengine.max_retries={recipe.engine.max_retries} are used up", again
                ) from error
            console.print(f"{first}; retry {retry} of {recipe.engine.max_retries}", style="yellow")
            before = failure
    raise AssertionError("an endless loop ended")
