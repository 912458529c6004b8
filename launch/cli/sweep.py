"""`make train sweep="optim.lr=1e-5,2e-5 seed=0,1,2"`: every combination is a run of its own. They run one after another, and end in
one table."""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from launch.cli.stages import STAGES, Stage, check_overrides
from launch.run import metrics, run_state
from launch.run.run_state import Reached
from recipes.compose.options import is_option
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.errors import ConfigError, LimiError, TrainError
from recipes.paths import run_folder

WORD = "sweep"
_CLOSING = {"[": "]", "{": "}", "(": ")", "'": "'", '"': '"'}
_EXAMPLE = 'write sweep="optim.lr=1e-5,2e-5 seed=0,1,2"'


@dataclass(frozen=True)
class Run:
    """One run of a sweep. words: its values of the swept options, `name=value`."""

    recipe: Recipe
    words: tuple[str, ...]


def parted(overrides: list[str]) -> tuple[list[str], str | None]:
    """Return the overrides without `sweep=`, and its text; None if there is none. Raise `ConfigError` if there are two."""
    texts = [word.partition("=")[2] for word in overrides if word.startswith(f"{WORD}=")]
    if len(texts) > 1:
        raise ConfigError(f"{len(texts)} words sweep=", f"{_EXAMPLE}, one word for all options")
    return [word for word in overrides if not word.startswith(f"{WORD}=")], texts[0] if texts else None


def run_sweep(
    stage: Stage, overrides: list[str], text: str, console: Console, run_one: Callable[[list[str]], None]
) -> None:
    """Run the stage on every combination. A run that fails does not end the sweep; a finished run is left as it is.

    run_one: runs the stage on the recipe of its overrides.

    Raise `ConfigError` before anything runs if one of the recipes is wrong, and `TrainError` at the end if runs failed.
    """
    if stage.name != "train":
        raise ConfigError(f"sweep={text} is an option of train, and {stage.name} does not read it", "leave it out")
    runs = runs_of(overrides, text)
    console.print(f"{len(runs)} runs: {', '.join(run.recipe.run for run in runs)}")
    if runs[0].recipe.dry_run:
        for run in runs:
            console.print(f"  would run: {shlex.join(['make', stage.name, *run.recipe.overrides])}")
        return
    failed = {}
    for number, run in enumerate(runs, 1):
        console.print(f"\n{number} of {len(runs)}: {run.recipe.run}", style="bold")
        try:
            run_one(run.recipe.overrides)
        except LimiError as error:
            console.print(f"{type(error).__name__}: {error}", style="red")
            failed[run.recipe.run] = str(error).splitlines()[0]
        else:
            _refuse_stopped(run.recipe)
    console.print(table(runs, failed))
    if failed:
        raise TrainError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}",
            "the same command goes on with these, and leaves the others as they are",
        )


def runs_of(overrides: list[str], text: str) -> list[Run]:
    """Return the runs of a sweep, composed. Raise `ConfigError` if a recipe is wrong, or two runs would have one name."""
    options = list(_options(text))
    if twice := [name for name, count in Counter(name for name, _ in options).items() if count > 1]:
        raise ConfigError(f"sweep={text} names {', '.join(twice)} twice", _EXAMPLE)
    own = [word for word in overrides if not word.startswith("run=")]
    named = [word.partition("=")[2] for word in overrides if word.startswith("run=")]
    short = _short([name for name, _ in options])
    runs = []
    for values in itertools.product(*(values for _, values in options)):
        words = tuple(f"{name}={value}" for (name, _), value in zip(options, values, strict=True))
        base = named[-1] if named else compose_recipe([*own, *words], "train").run
        parts = (
            re.sub(r"[^\w.-]+", "_", f"{short[name]}{value}") for (name, _), value in zip(options, values, strict=True)
        )
        recipe = compose_recipe([*own, *words, f"run={'-'.join([base, *parts])}"], "train")
        check_overrides(STAGES["train"], recipe.overrides)
        runs.append(Run(recipe, words))
    if same := [name for name, count in Counter(run.recipe.run for run in runs).items() if count > 1]:
        raise ConfigError(
            f"sweep={text}: {', '.join(same)} would be the name of several runs", "sweep over values that differ"
        )
    return runs


def _options(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every option of a sweep with its values."""
    words = _parts(text, " ")
    if not words:
        raise ConfigError("sweep= names no option", _EXAMPLE)
    for word in words:
        name, equals, listed = word.partition("=")
        values = [value.strip("'\"") for value in _parts(listed, ",", keep_empty=True)]
        if not equals or not all(values) or not is_option(name) or name in ("run", "dry_run", "anew"):
            raise ConfigError(f"sweep={text}: '{word}' is not OPTION=VALUE,VALUE", _EXAMPLE)
        yield name, values


def _parts(text: str, separator: str, *, keep_empty: bool = False) -> list[str]:
    """Split a text at a separator, except inside brackets, braces and quotes. Raise `ConfigError` if one of them is not closed."""
    parts, closing = [""], ""
    for c in text:
        if c == separator and not closing:
            parts.append("")
            continue
        if closing and c == closing[-1]:
            closing = closing[:-1]
        elif c in _CLOSING and closing[-1:] not in ("'", '"'):
            closing += _CLOSING[c]
        parts[-1] += c
    if closing:
        raise ConfigError(f"sweep={text} has no closing {closing[-1]}", _EXAMPLE)
    return parts if keep_empty else [part for part in parts if part]


def _short(names: list[str]) -> dict[str, str]:
    """Return the names' last parts, or whole names where two have the same."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return {name: name if last[name.rpartition(".")[2]] > 1 else name.rpartition(".")[2] for name in names}


def _refuse_stopped(recipe: Recipe) -> None:
    """Raise `KeyboardInterrupt` if a signal ended the run before its last step: the next run must not start."""
    if recipe.cluster.address is None and run_state.of(recipe).reached < Reached.trained:
        raise KeyboardInterrupt(
            f"{recipe.run} was stopped; the same command goes on with it, and then with the next ones."
        )


def table(runs: list[Run], failed: dict[str, str]) -> Table:
    """Build the table of all runs, from the files in their folders. failed: run to the first line of its error."""
    names = [word.partition("=")[0] for word in runs[0].words]
    out = Table(title="Sweep", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("run", overflow="fold")
    for column in (*names, "steps", "loss", "held-out loss", "checks"):
        out.add_column(column, justify="right")
    for run in runs:
        values = [word.partition("=")[2] for word in run.words]
        out.add_row(
            run.recipe.run, *values, *_figures(run_folder(run.recipe)), style="red" if run.recipe.run in failed else ""
        )
    return out


def _figures(folder: Path) -> list[str]:
    """Return a run's steps, last losses and failed checks as text."""
    if not (folder / metrics.NAME).is_file():
        return ["not on this machine", "", "", ""]
    lines = metrics.read_metrics(folder / metrics.NAME)
    losses, heldout = ([line[name] for line in lines if name in line] for name in ("loss", "heldout_loss"))
    checks = "not run"
    if (folder / "sanity.json").is_file():
        outcomes = Counter(one["outcome"] for one in json.loads((folder / "sanity.json").read_text(encoding="utf-8")))
        checks = (
            f"{outcomes['fail']} of {outcomes.total()} failed"
            if outcomes["fail"]
            else f"{outcomes.total()}, none failed"
        )
    return [str(len(losses)), f"{losses[-1]:.4f}" if losses else "", f"{heldout[-1]:.4f}" if heldout else "", checks]
