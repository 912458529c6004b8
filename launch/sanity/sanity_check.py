"""The sanity check of an export: first its files, then its behaviour when served by SGLang.

It writes `sanity.json`, `moved.json` and `likelihood.json`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

from rich.console import Console
from rich.progress import Progress, TaskID

from data_prep.files import write_text
from launch.checks import Check, Outcome
from launch.sanity.subject import Subject
from launch.sanity.tensors.looks import UNREADABLE
from launch.serving import sglang_command
from launch.serving.client import Client
from recipes.config import Recipe
from recipes.errors import PreflightError, SanityError


def run_checks(subject: Subject, console: Console) -> list[Check]:
    """Run every check, regardless of the others' outcomes, and write and return the results. The caller fails the command."""
    from launch.sanity.files import file_checks as files

    subject.folder.mkdir(parents=True, exist_ok=True)
    for earlier in ("moved.json", "likelihood.json"):
        (subject.folder / earlier).unlink(missing_ok=True)
    recipe = subject.recipe
    base = Path(recipe.model.checkpoint)
    done = files.file_checks(
        subject.export,
        base,
        recipe,
        subject.rates,
        subject.checkpoint,
        console=console,
        written=subject.folder / "moved.json",
    )
    _write(subject, done)
    for checks in _by_server(subject, console):
        done += checks
        _write(subject, done)  # written after each step, so that results survive if the command ends early
    return done


def say_unserved(recipe: Recipe, export: Path, console: Console) -> None:
    """Warn, before anything is read, if no server can start here: then only the export's files are checked."""
    if recipe.sanity.url is None:
        try:
            sglang_command.check_machine(recipe, export)
        except PreflightError as error:
            text = f"warning: no server can be started, so only the files are checked: {error}"
            console.print(text, style="yellow", markup=False, highlight=False)


def _write(subject: Subject, done: list[Check]) -> None:
    text = json.dumps([c.as_json() for c in done], indent=2, ensure_ascii=False)
    write_text(subject.folder / "sanity.json", text + "\n")


def _by_server(subject: Subject, console: Console) -> Iterator[list[Check]]:
    """Yield the checks of each step on the served export, or one check that says why there is no server."""
    from launch.serving.server import running

    # A job's log is not a terminal and shows no progress bar.
    console.print(f"querying SGLang (takes minutes on a CPU): {subject.log}")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Starting SGLang", total=None)
        try:
            with running(subject.recipe, subject.export, subject.log, subject.data.thinks) as client:
                yield from _run_steps(subject, client, bar, task)
        except PreflightError as error:  # a fault of this machine, not of the export
            protects_from = "an export that was never served"
            yield [Check("server", protects_from, "not asked", "asked", Outcome.warned, str(error))]
        except SanityError as error:
            yield [_unanswered("server", str(error))]


def _run_steps(subject: Subject, client: Client, bar: Progress, task: TaskID) -> Iterator[list[Check]]:
    """Yield the checks of each step on the server.

    If the server refuses a request, or answers in another format than SGLang, the step fails and the next one runs. Raise
    `SanityError` if the server is gone or hangs.
    """
    from launch.sanity.served import Served

    steps = list(Served(subject, client).steps())
    bar.update(task, total=sum(requests for _, requests, _ in steps))
    for name, _, step in steps:
        bar.update(task, description=f"Querying SGLang: {name}")
        try:
            yield step(lambda: bar.advance(task))
        except SanityError as error:
            if not isinstance(error.__cause__, HTTPError | None):
                raise
            yield [_unanswered(name, str(error))]
        except UNREADABLE as error:
            yield [_unanswered(name, f"the server answers, but not as SGLang does: {type(error).__name__}: {error}")]


def _unanswered(name: str, error: str) -> Check:
    return Check(name, "a checkpoint that no server serves", "no answer", "answers", Outcome.failed, error)


def refuse_failed(done: list[Check], subject: Subject) -> None:
    """Raise `SanityError` naming every failed check, if there are any."""
    failed = [
        f"{c.name}: {c.figure} (limit: {c.limit}). {c.detail}".strip() for c in done if c.outcome is Outcome.failed
    ]
    if failed:
        raise SanityError(
            f"{len(failed)} of {len(done)} checks failed; {subject.folder / 'sanity.json'}\n" + "\n".join(failed),
            "the same command repeats the check, with other sanity overrides if they help, and trains nothing",
        )
