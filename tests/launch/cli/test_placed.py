"""A stage that serves a model runs where the GPUs are, and its output, its end and an interrupt arrive as if it ran here."""

import contextlib
import io
import os
import subprocess
import time

import pytest
from rich.console import Console

from launch.cli import placed
from launch.serving import sglang_command
from recipes.compose.recipe import compose_recipe
from recipes.errors import PreflightError, SanityError
from recipes.plan.serving import Servers

pytestmark = pytest.mark.run


@pytest.fixture
def four_gpus(monkeypatch):
    """A Ray of one node that has four GPUs by its own word."""
    from launch.cluster.connection import connected

    @contextlib.contextmanager
    def of_four():
        with connected(num_cpus=4, num_gpus=4):
            yield

    monkeypatch.setattr(placed, "connected", of_four)
    monkeypatch.setattr(sglang_command, "context", lambda recipe, export: 1)


def run(monkeypatch, wanted, *words, stage="plan"):
    monkeypatch.setattr(placed, "servers", lambda recipe, longest: wanted)
    said = io.StringIO()
    placed.run_placed(stage, compose_recipe([]), None, [*words], Console(file=said))
    return said.getvalue()


def test_its_output_is_shown_here_and_a_failure_fails_here(monkeypatch, four_gpus, tmp_path):
    said = run(monkeypatch, Servers(2, 1), f"cluster.root={tmp_path}", "run=here")
    assert "plan.html and plan.json" in said and (tmp_path / "plans" / "here" / "plan.json").exists()
    with pytest.raises(SanityError, match="plan failed with status 2 where the GPUs are"):
        run(monkeypatch, Servers(2, 1), "optim.lr=-1")


def test_gpus_that_are_not_there_are_not_waited_for_without_end(monkeypatch, four_gpus):
    monkeypatch.setattr(placed, "PLACE_S", 1.0)
    with pytest.raises(PreflightError, match="no 2 nodes with 4 free GPUs each within 1 s; wait for the job"):
        run(monkeypatch, Servers(8, 2))


def test_an_interrupt_ends_what_runs_there(monkeypatch, four_gpus, tmp_path):
    class Out(io.StringIO):
        def write(self, text):
            if "step 1" in text:
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(placed, "servers", lambda recipe, longest: Servers(1, 1))
    with pytest.raises(KeyboardInterrupt):
        placed.run_placed("train", compose_recipe([]), None, [f"cluster.root={tmp_path}"], Console(file=Out()))
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_only_a_job_whose_model_is_served_on_gpus_is_placed(monkeypatch):
    on_gpus, on_cpu = compose_recipe(["model=qwen3-4b"]), compose_recipe([])
    assert not placed.elsewhere(on_gpus), "no job"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert placed.elsewhere(on_gpus) and not placed.elsewhere(on_cpu)
    assert not placed.elsewhere(compose_recipe(["model=qwen3-4b", "sanity.url=http://h:1"]))
    monkeypatch.setenv(placed.PLACED, "1")
    assert not placed.elsewhere(on_gpus), "it is there already"
    assert os.environ[placed.PLACED]
