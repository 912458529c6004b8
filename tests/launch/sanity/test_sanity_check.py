"""All checks in order: whatever fails, the others are made, what was found is written, and nothing is left running."""

import dataclasses
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from data_prep.sample import make
from launch import checks
from launch.checks import Check, Outcome
from launch.run.run_plan import Plan
from launch.sanity import sanity_check as sanity
from launch.sanity import sanity_page
from launch.sanity.served import Served
from launch.sanity.subject import Subject, of_export
from launch.serving import sglang_command
from launch.serving.client import Client
from recipes.compose.recipe import compose_recipe, to_yaml
from recipes.errors import SanityError
from tests.launch.sanity import broken
from tests.launch.serving import fake_server
from tests.launch.support import alive, descendants, recipe_of

pytestmark = pytest.mark.run

SAMPLE = Path(make.__file__).parent / "train.jsonl"
FAKE = Path(fake_server.__file__)
QUIET = Console(quiet=True)
FILES = 20  # checks of a Qwen3's files
TIMEOUT = 10
STEPS = {
    "served": ["served"],
    "held-out loss": ["held-out loss"],
    "answers": ["calls on trained prompts", "stop token", "no marks in text", "same language"],
    "chat template": ["chat template"],
    "parsers": ["tool-call parser qwen25", "reasoning parser qwen3"],
    "streaming": ["streaming"],
    "closed loop": ["closed loop"],
    "the base": ["the base on trained prompts"],
}


@pytest.fixture
def subject(root, tmp_path):
    """The base as its own export, with a NaN in it, and three trajectories of the sample."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(SAMPLE.read_text().splitlines(keepends=True)[:3]))
    words = [
        "model=qwen3-tiny",
        f"sanity.timeout={TIMEOUT}",
        "sanity.prompts=4",
        f"data.path={few}",
    ]
    recipe, data, heldout = recipe_of(root, *words)
    base = Path(recipe.model.checkpoint)
    export = broken.make(broken.FAULTS["NaN"], base, base, base, tmp_path / "hf")
    return Subject(recipe, export, tmp_path / "found", data, heldout, None, 1.0)


@pytest.fixture
def checked(subject, monkeypatch):
    """What is found of a server with this fault, at this path alone where one is named."""

    def run(*words, **more):
        command = [sys.executable, str(FAKE)]
        monkeypatch.setattr(
            sglang_command, "command", lambda recipe, export, port, thinks: [*command, str(port), *words]
        )
        before = set(descendants(os.getpid()))
        done = sanity.run_checks(dataclasses.replace(subject, **more), QUIET)
        started = [int(pid) for pid in re.findall(r"\d+", re.match(r"children.*|", subject.log.read_text())[0])]
        assert not alive([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], 3)
        assert not alive(list(set(descendants(os.getpid())) - before), 3)
        assert json.loads((subject.folder / "sanity.json").read_text()) == [c.as_json() for c in done]
        assert len({c.name for c in done}) == len(done)
        found = {c.name: c for c in done}
        assert found["finite numbers"].outcome is Outcome.failed, "a fault of the files, found before"
        return found

    return run


def made(found):
    """The steps of which a check is there."""
    return [name for name, checks in STEPS.items() if set(checks) <= found.keys()]


@pytest.mark.run
def test_a_fault_of_the_files_does_not_stop_the_server_s_checks(checked):
    found = checked("good", "/no/path")
    assert made(found) == list(STEPS)
    assert {"held-out loss beside the base", "loss by turn", "calls per turn, in the loop"} <= found.keys()
    assert found["served"].outcome is found["held-out loss"].outcome is Outcome.passed
    assert found["calls on trained prompts"].outcome is found["chat template"].outcome is Outcome.failed


QUICK = ["/generate", "/v1/chat/completions", "/tokenize"]
REFUSED = {
    "/model_info": ["served"],
    "/server_info": ["served", "held-out loss"],
    "/generate": ["held-out loss"],
    "/v1/chat/completions": ["answers", "closed loop", "the base"],
    "/tokenize": ["chat template"],
    "/parse_function_call": ["parsers"],
    "/update_weights_from_disk": ["the base"],
}


@pytest.mark.parametrize(
    ("fault", "path"),
    [
        *(pytest.param("error", path, marks=[] if path in QUICK else pytest.mark.slow) for path in REFUSED),
        *(("refused", "/generate"), ("other_shape", "/tokenize"), ("other_shape", "/server_info")),
        ("other_shape", "/v1/chat/completions"),
    ],
)
def test_what_the_server_refuses_has_failed_by_name_and_the_rest_is_made(checked, fault, path):
    found = checked(fault, path)
    lost = REFUSED[path] if (fault, path) != ("other_shape", "/server_info") else ["held-out loss"]
    for name in lost:
        assert found[name].outcome is Outcome.failed and found[name].figure == "no answer"
        if fault == "other_shape":
            assert found[name].detail.startswith("the server answers, but not as SGLang does: KeyError")
        else:
            assert f"SGLang answered {500 if fault == 'error' else 400} to {path}: " in found[name].detail
    alone = {"served", "held-out loss", "chat template", "closed loop"}  # steps of one check, of the same name
    assert set(made(found)) | set(lost) == set(STEPS)
    assert set(made(found)) & set(lost) <= alone
    assert "server" not in found


@pytest.mark.run
def test_a_prompt_too_long_for_the_server_is_the_loop_s_own_failure(checked):
    found = checked("refused", "/v1/chat/completions")
    assert found["answers"].figure == "no answer"
    assert found["closed loop"].outcome is Outcome.failed and "7 refused" in found["closed loop"].figure


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("die", "SGLang ended with status 7; the end of .*CUDA error: an illegal memory access"),
        pytest.param(
            "hang",
            f"did not answer /generate: no sign of work for sanity.timeout={TIMEOUT} s; on a slow machine write "
            f"`make sanity .*sanity.timeout={2 * TIMEOUT}`",
            marks=pytest.mark.slow,
        ),
        ("half", "did not answer /generate: IncompleteRead"),
    ],
)
def test_a_server_that_is_gone_or_hangs_ends_it_with_one_failed_row(checked, fault, says):
    started = time.monotonic()
    found = checked(fault, "/generate")
    assert time.monotonic() - started < TIMEOUT + 25
    assert list(found)[FILES:] == ["served", "server"], "what was asked before stays"
    assert found["server"].outcome is Outcome.failed
    assert re.search(says, found["server"].detail, re.DOTALL)


@pytest.mark.run
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["never_up"], f"no sign of work and no log output for sanity.timeout={TIMEOUT} s"),
        (["no_such_fault", "too", "many"], "ended with status 1"),
    ],
)
def test_a_server_that_does_not_start_is_one_failed_row(checked, words, says):
    found = checked(*words)
    assert list(found)[FILES:] == ["server"]
    assert says in found["server"].detail


def test_the_weights_of_another_s_server_are_left_alone(subject):
    def steps(own):
        client = Client("http://127.0.0.1:9", 1)
        client.own = own
        return [name for name, _, _ in Served(subject, client).steps()]

    assert steps(True) == list(STEPS)
    assert steps(False) == list(STEPS)[:-1]


@pytest.mark.run
def test_without_held_out_data_that_is_said_and_the_rest_is_made(checked):
    found = checked("good", "/no/path", heldout=None)
    assert found["held-out loss"].outcome is Outcome.warned and "data.heldout=FILE" in found["held-out loss"].detail
    assert made(found) == list(STEPS)


def row(name, outcome, detail=""):
    return Check(name, "what <goes> wrong", f"figure of {name}", f"limit of {name}", outcome, detail)


DONE = [
    row("good", Outcome.passed),
    row("odd", Outcome.warned),
    row("bad", Outcome.failed, "seen: <s>"),
    row("worse", Outcome.failed),
]


def test_every_failed_check_is_named_and_no_other(subject):
    with pytest.raises(SanityError, match="^2 of 4 checks failed; ") as error:
        sanity.refuse_failed(DONE, subject)
    summary, *lines = str(error.value).splitlines()
    assert summary.endswith(str(subject.folder / "sanity.json"))
    assert lines == [
        "bad: figure of bad (limit: limit of bad). seen: <s>",
        "worse: figure of worse (limit: limit of worse).",
        "the same command repeats the check, with other sanity overrides if they help, and trains nothing",
    ]
    sanity.refuse_failed(DONE[:2], subject)


def test_the_table_shows_every_check_with_its_outcome():
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(checks.table("Sanity check", DONE, 200))
    lines = console.export_text().splitlines()
    for mark, name in (("pass", "good"), ("warn", "odd"), ("FAIL", "bad"), ("FAIL", "worse")):
        assert any(mark in line and f"figure of {name}" in line and f"limit of {name}" in line for line in lines)


def test_the_page_has_a_row_of_every_check_and_says_how_it_ended(subject):
    assert sanity_page.verdict(subject.folder) == "not checked"
    subject.folder.mkdir()
    for done, says in ((DONE[:2], "all checks passed"), (DONE, "a check failed")):
        sanity._write(subject, done)
        assert says in sanity_page.verdict(subject.folder)
        (table,) = sanity_page.section(subject.folder)
        assert all(c.name in table and c.figure in table and c.limit in table for c in done)
        assert ("seen: &lt;s&gt;" in table) == (done is DONE) and "<goes>" not in table
    written = sanity_page.write_sanity_page(subject)
    assert written == subject.folder / "sanity.html" and "a check failed" in written.read_text()


def test_an_export_of_a_run_is_checked_by_the_recipe_that_the_command_names(root, tmp_path):
    """The run's own, and the machine, base and limits of the words."""
    made = Plan(*recipe_of(root, "model=qwen3-tiny"))
    made.write(tmp_path / "plan.json")
    (tmp_path / "config.yaml").write_text(to_yaml(made.recipe))
    (tmp_path / "metrics.jsonl").write_text("")
    recipe = dataclasses.replace(made.recipe, gpu=compose_recipe(["model=qwen3-4b"]).gpu)
    found = of_export(recipe, tmp_path / "hf", QUIET)
    assert found.recipe.gpu.name == "h100" and found.folder == tmp_path
    assert found.data.folder == made.data.folder
