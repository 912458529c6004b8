"""What slime is started with: a script and dotted names, which nothing but a run through slime would miss."""

import importlib.util
import io
import os
import signal
import subprocess

import psutil
import pytest
from rich.console import Console

from launch.slime import engine, job
from launch.slime.arguments import arguments
from recipes.compose.recipe import compose_recipe
from recipes.errors import TrainError
from tests.launch.slime.support import begun


def test_the_script_is_there():
    assert engine.DRIVER.is_file()


@pytest.mark.parametrize(
    "words", [["model=qwen3-32b", "layout=released-qwen3-32b"], ["model=qwen3-tiny", "engine=slime"]]
)
def test_every_name_that_slime_gets_is_there(megatron, words):
    names = [word for word in arguments(compose_recipe(words), 1, "/base") if word.startswith("launch.")]
    assert len(names) >= 3
    for name in names:
        package, _, last = name.rpartition(".")
        of_package = importlib.util.find_spec(package).submodule_search_locations
        assert importlib.util.find_spec(name) if of_package else hasattr(importlib.import_module(package), last), name


@pytest.mark.run
@pytest.mark.parametrize(
    ("script", "said"),
    [
        # A log that grows is no step.
        (
            "while sleep 0.2; do echo still waiting; done",
            "slime finished no step and no checkpoint for engine.timeout=2 s; raise",
        ),
        # The clock of a file server may be behind.
        (
            """for i in 1 2 3 4 5 6 7 8; do echo '{"step": '$i', "loss": 1, "grad_norm": 1, "lr": 1, "tokens": 1, "time": '"""
            """'{"step_s": 1}}' >> metrics.jsonl; touch -d '2 hours ago' metrics.jsonl; sleep 0.5; done; exit 3""",
            "status 3",
        ),
    ],
)
def test_a_run_is_alive_while_it_finishes_steps(root, tmp_path, script, said):
    run = begun(tmp_path, root, "engine.timeout=2", f"engine.python={tmp_path}/python")
    run.open()
    (run.root / "job.json").write_text('{"env_vars": {}}')
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(TrainError, match=said):
        engine.start(run.recipe, run, 0, 5, Console(file=io.StringIO()))
    assert not [p for p in psutil.Process().children() if str(tmp_path) in " ".join(p.cmdline())]


@pytest.mark.run
def test_a_start_ends_what_a_killed_start_of_this_run_left_and_nothing_else(root, tmp_path):
    run = begun(tmp_path, root, f"engine.python={tmp_path}/python")
    run.open()
    (run.root / "job.json").write_text('{"env_vars": {}}')
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    left, other = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, job.RUN: str(folder)})
        for folder in (run.root, run.root.with_name("other"))
    )
    try:
        with pytest.raises(TrainError, match="status 3"):
            engine.start(run.recipe, run, 0, 5, Console(file=io.StringIO()))
        assert left.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
