"""The stages: what each reads of the command line, and that no option is taken and then read by nobody."""

import importlib
import inspect
import re

import pytest

from launch.cli import stages
from recipes.compose.options import leaves
from recipes.config import EngineName
from recipes.errors import ConfigError
from tests.conftest import REPO


@pytest.mark.parametrize("stage", stages.STAGES.values(), ids=stages.STAGES)
def test_a_stage_s_function_is_there(stage):
    module, name = stage.function.split(":")
    assert (
        list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)[1:] == ["console"]
        or stage.name == "bench-gpu"
    )


@pytest.mark.parametrize(
    ("stage", "words", "says"),
    [
        ("train", ["checkpoint=/x"], "checkpoint is an option of sanity and serve, and train does not read it; "
         "write model.checkpoint=FOLDER to start from it, or leave it out"),
        ("plan", ["step=3"], "step is an option of replay and export, and plan does not read it; leave it out"),
        ("data", ["id=a"], "id is an option of inspect, and data does not read it; leave it out"),
        ("train", ["limit_s=5"], "limit_s is an option of bench-gpu, and train does not read it; leave it out"),
        ("parity", ["model=qwen3-4b"], "parity does not read model: it measures models of its own; leave out all but dry_run"),
        ("bench", ["optim.lr=1"], "bench does not read optim.lr: it measures models of its own; "
         "leave out all but dry_run, cluster.root, model, model.checkpoint"),
    ],
)  # fmt: skip
def test_a_word_that_the_stage_would_not_read_is_refused(stage, words, says):
    with pytest.raises(ConfigError) as error:
        stages.check_overrides(stages.STAGES[stage], words)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("sanity", ["checkpoint=/x", "model=qwen3-tiny"]),
        ("export", ["step=5", "run=a"]),
        ("inspect", ["id=a"]),
        ("bench-gpu", ["limit_s=60"]),
        ("bench", ["model.checkpoint=/x"]),
        ("parity", ["dry_run=true"]),
        ("train", ["model=qwen3-4b", "optim.lr=1", "sanity.timeout=5"]),
    ],
)
def test_a_word_that_the_stage_reads_is_taken(stage, words):
    stages.check_overrides(stages.STAGES[stage], words)


ROOMS = ("cli", "cluster", "run", "weights", "export", "serving", "sanity")
SHARED = ["recipes/**/*.py", "data_prep/**/*.py", *(f"launch/{room}/**/*.py" for room in ROOMS)]
OF_ENGINE = {
    EngineName.megatron: [*SHARED, "launch/megatron/*.py", "launch/model/*.py", "launch/preflight/recipe_checks.py"],
    EngineName.slime: [*SHARED, "launch/slime/**/*.py", "launch/preflight/*.py"],
}
# Files that define overrides, and use none of them.
DEFINE = (
    "recipes/config.py",
    "recipes/compose/recipe.py",
    "recipes/compose/values.py",
    "recipes/compose/os_errors.py",
    "recipes/compose/names/foreign_names.py",
)
REFUSED = {  # by `recipes.compose.values`
    EngineName.megatron: {"engine.wandb", "engine.slime_root", "engine.megatron_root", "engine.node_timeout"},
    EngineName.slime: set(),
}


@pytest.mark.parametrize("engine", EngineName)
def test_every_option_is_read_or_refused(engine):
    """By its name in the files that an engine runs: an option that none of them names is refused by `check_values`."""
    paths = {p for pattern in OF_ENGINE[engine] for p in REPO.glob(pattern) if str(p.relative_to(REPO)) not in DEFINE}
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(paths))
    read = {name for pair in re.findall(r"\.([a-z_0-9]+)\b|\"([a-z_0-9]+)\"", text) for name in pair}
    assert {name for name in leaves() if name.rpartition(".")[2] not in read} == REFUSED[engine]
