"""What slime is started with: a script and dotted names, which nothing but a run through slime would miss."""

import importlib.util

import pytest

from launch.slime import engine
from launch.slime.arguments import arguments
from recipes.compose.recipe import compose_recipe


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
