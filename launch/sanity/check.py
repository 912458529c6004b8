"""The sanity check of a run's export: its files, then what SGLang makes of it; writes `sanity.json` and `moved.json`."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from data_prep.chat import load_tokenizer
from data_prep.files import write_text
from launch.metrics import heldout_losses, rates
from launch.plan import Plan
from launch.run_folder import RunFolder
from launch.sanity import checks
from launch.sanity.checks import Answer, Check, Outcome, Turn
from launch.sanity.server import Server
from recipes.config import Dtype, Recipe
from recipes.errors import SanityError

_MARKS = {Outcome.passed: ("pass", "green"), Outcome.warned: ("warn", "yellow"), Outcome.failed: ("FAIL", "bold red")}


def check(plan: Plan, run: RunFolder, console: Console, serves: bool) -> list[Check]:
    """Runs every check and writes `sanity.json`, whether they pass or not; the caller fails the command.

    serves: whether a server is asked; not where the files are wrong already, which it would say in worse words.
    """
    from launch.sanity import files

    base, learned = Path(plan.recipe.model.checkpoint), rates(run.root)
    done = files.checks(run.hf, base, plan.recipe, learned, console=console, written=run.root / "moved.json")
    if serves and not any(c.outcome is Outcome.failed for c in done):
        _write(run, done)  # for who looks why the server did not start
        done += _by_server(plan, run, console)
    _write(run, done)
    return done


def _write(run: RunFolder, done: list[Check]) -> None:
    write_text(run.root / "sanity.json", json.dumps([asdict(c) for c in done], indent=2, ensure_ascii=False) + "\n")


def _by_server(plan: Plan, run: RunFolder, console: Console) -> list[Check]:
    """The same server then loads the base's weights, so that the calls before and after training stand side by side."""
    recipe = plan.recipe
    assert plan.heldout is not None
    trained, heldout = list(checks.turns(plan.data)), list(checks.turns(plan.heldout))
    tokenizer = load_tokenizer(run.hf)
    turns = 2 * len(trained) + len(heldout)
    # A job's log is no terminal: no bar shows there.
    console.print(
        f"asking SGLang for {turns} turns of the export and the base, minutes on a CPU: {run.root / 'sglang.log'}"
    )
    with ExitStack() as stack:
        with console.status("Starting SGLang"):
            server = stack.enter_context(Server(recipe, run.hf, run.root / "sglang.log"))
        ask = stack.enter_context(_progress(console, turns))
        done = [checks.served(server, json.loads((run.hf / "config.json").read_text())["architectures"][0])]
        after, new = ask(server, trained), ask(server, heldout)
        done += [
            checks.template_parity(after + new, lambda tokens: str(tokenizer.decode(tokens))),
            checks.heldout_nll(server, plan.heldout, _last_loss(run), _tolerance(recipe)),
            checks.right_calls("calls on trained prompts", after, recipe.sanity.min_tool_calls),
            checks.right_calls("calls on held-out prompts", new, None),
            checks.valid_calls(after + new),
        ]
        answer = server.post("/update_weights_from_disk", {"model_path": recipe.model.checkpoint})
        if not answer["success"]:
            raise SanityError(f"SGLang could not load the base's weights: {answer['message']}")
        done.append(checks.right_calls("the base on trained prompts", ask(server, trained), None))
    return done


def _tolerance(recipe: Recipe) -> float:
    return recipe.sanity.nll_tolerance_bf16 if recipe.engine.dtype is Dtype.bf16 else recipe.sanity.nll_tolerance


def _last_loss(run: RunFolder) -> float:
    losses = heldout_losses(run.root / "metrics.jsonl")
    return losses[max(losses)] if losses else math.nan


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Asking SGLang", total=total)

        def ask(server: Server, turns: list[Turn]) -> list[Answer]:
            return checks.ask(server, turns, lambda: bar.advance(task))

        yield ask


def table(done: list[Check]) -> Table:
    out = Table(title="Sanity check", title_justify="left")
    for column in ("", "check", "figure", "limit"):
        out.add_column(column)
    for c in done:
        out.add_row(Text(*_MARKS[c.outcome]), c.name, c.figure, c.limit)
    return out


def refuse_failed(done: list[Check], run: RunFolder) -> None:
    """Raises `SanityError` naming every failed check."""
    failed = [
        f"{c.name}: {c.figure} (limit: {c.limit}). {c.detail}".strip() for c in done if c.outcome is Outcome.failed
    ]
    if failed:
        raise SanityError(
            f"{len(failed)} of {len(done)} checks failed; {run.root / 'sanity.json'}\n" + "\n".join(failed)
        )
