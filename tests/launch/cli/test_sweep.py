"""A sweep: each combination is a run of its own, composed before anything runs, and a comma elsewhere keeps its meaning."""

import io
import json

import pytest
from rich.console import Console

from launch.cli import sweep
from launch.cli.stages import STAGES
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, TrainError
from recipes.paths import run_folder
from tests.launch.support import called


def names(*words):
    overrides, text = sweep.parted([*words])
    return [run.recipe.run for run in sweep.runs_of(overrides, text)]


def test_each_combination_is_a_run_of_its_own():
    assert names("sweep=optim.lr=1e-5,2e-5 seed=0,1") == [
        "qwen3-tiny-lr1e-5-seed0", "qwen3-tiny-lr1e-5-seed1", "qwen3-tiny-lr2e-5-seed0", "qwen3-tiny-lr2e-5-seed1",
    ]  # fmt: skip
    assert names("run=a", "model=glm4.5-tiny", "sweep=seed=3") == ["a-seed3"]
    assert names("sweep=model=qwen3-tiny,glm4.5-tiny") == ["qwen3-tiny-modelqwen3-tiny", "glm4.5-tiny-modelglm4.5-tiny"]


def test_options_arrive_in_the_recipe_as_typed():
    runs = sweep.runs_of(["optim.epochs=3"], "optim.lr=1e-5,2e-5 data.path='a,b.jsonl'")
    assert [(run.recipe.optim.lr, run.recipe.optim.epochs) for run in runs] == [(1e-5, 3), (2e-5, 3)]
    assert runs[0].recipe.overrides[0] == "optim.epochs=3"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no option"), ("optim.lr", "is not OPTION=VALUE"), ("optim.lr=", "is not OPTION=VALUE"),
        ("optim.lr=1e-5,", "is not OPTION=VALUE"), ("optim.lr=1e-5,,2e-5", "is not OPTION=VALUE"),
        ("nothing=1,2", "is not OPTION=VALUE"), ("seed=0 seed=1", "twice"), ("run=a,b", "is not OPTION=VALUE"),
        ("seed=1,1", "the name of several runs"), ("seed='0", "no closing '"), ("data.path=[a,b", "no closing ]"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused_before_anything_runs(text, says):
    with pytest.raises(ConfigError, match=says):
        sweep.runs_of([], text)


def test_a_wrong_recipe_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="optim.lr=-1"):
        sweep.runs_of([], "optim.lr=1e-5,-1")


def test_an_option_that_train_does_not_read_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="step is an option of replay and export, and train does not read it"):
        sweep.runs_of(["step=3"], "seed=0,1")


def test_only_train_sweeps():
    with pytest.raises(ConfigError, match="is an option of train, and plan does not read it"):
        sweep.run_sweep(STAGES["plan"], [], "seed=0", Console(quiet=True), lambda words: None)


class Stage:
    name = "train"

    def __init__(self, fails=()):
        self.ran, self.fails = [], fails

    def run(self, words):
        recipe = compose_recipe(words)
        self.ran.append(recipe.run)
        if recipe.run in self.fails:
            raise TrainError(f"{recipe.run} hung", "try again")
        folder = run_folder(recipe)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": 2.5}) + "\n" + json.dumps({"step": 1, "heldout_loss": 3})
        )
        (folder / "sanity.json").write_text('[{"outcome": "pass"}, {"outcome": "fail"}]')


@pytest.fixture
def finished(monkeypatch):
    monkeypatch.setattr(sweep, "_refuse_stopped", lambda recipe: None)


def test_one_that_fails_does_not_end_the_others_and_the_table_has_all(tmp_path, finished):
    stage, said = Stage(fails=["s-seed1"]), io.StringIO()
    with pytest.raises(TrainError, match="1 of 3 runs failed: s-seed1"):
        sweep.run_sweep(
            stage, [f"cluster.root={tmp_path}", "run=s"], "seed=0,1,2", Console(file=said, width=120), stage.run
        )
    assert stage.ran == ["s-seed0", "s-seed1", "s-seed2"]
    rows = said.getvalue().partition("Sweep")[2]
    assert rows.count("1 of 2 failed") == 2 and "2.5000" in rows and "s-seed1" in rows


def test_a_run_that_was_stopped_ends_the_sweep(tmp_path):
    stage = Stage()
    with pytest.raises(KeyboardInterrupt, match="s-seed0 was stopped; the same command goes on"):
        sweep.run_sweep(stage, [f"cluster.root={tmp_path}", "run=s"], "seed=0,1", Console(quiet=True), stage.run)
    assert stage.ran == ["s-seed0"]


def test_a_dry_run_shows_the_commands():
    done = called("train", "sweep=seed=0,1", "optim.epochs=2", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "would run: make train optim.epochs=2 dry_run=true seed=1 run=qwen3-tiny-seed1" in done.stdout


def test_a_list_where_one_value_belongs_is_told_of_the_sweep():
    done = called("train", "optim.lr=1e-5,2e-5")
    assert done.returncode == 2 and "sweep=optim.lr=1e-5,2e-5" in done.stderr
