"""Which file, or the command line, set a value last."""

import pytest
import yaml

from recipes.compose.options import NAMES
from recipes.compose.origins import annotated, origins
from recipes.compose.recipe import compose_recipe, to_yaml


@pytest.mark.parametrize(
    ("words", "name", "origin"),
    [
        ([], "optim.lr", "hydra_conf/optim/tiny.yaml"),
        ([], "seed", "hydra_conf/limi.yaml"),
        ([], "optim.beta2", "recipes/config.py"),
        (["model=qwen3-32b"], "optim.lr", "hydra_conf/optim/limi.yaml"),
        (["model=qwen3-32b"], "gpu.name", "hydra_conf/gpu/h100.yaml"),
        (["model=qwen3-32b", "optim.lr=2e-5"], "optim.lr", "command line"),
        (["model=qwen3-32b", "experiment=released"], "model.rope", "hydra_conf/experiment/released.yaml"),
        (["model=qwen3-32b", "experiment=released"], "layout.tp", "hydra_conf/layout/released-qwen3.yaml"),
        (["cluster.env.A=b"], "cluster.env.A", "command line"),
    ],
)
def test_what_set_a_value_last_is_named(words, name, origin):
    assert origins(words)[name] == origin


def test_every_option_has_one_and_the_yaml_stays_as_it_was():
    words = ["model=glm4.5", "cluster.env.A=b"]
    written = to_yaml(compose_recipe(words))
    text = annotated(written, origins(words))
    assert yaml.safe_load(text) == yaml.safe_load(written)
    assert text.count("  # ") == len(NAMES) + 1
