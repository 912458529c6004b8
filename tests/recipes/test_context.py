import pytest

from recipes.compose.recipe import compose_recipe
from recipes.context import check_context
from recipes.errors import ConfigError


def model(*words):
    return compose_recipe(["model=qwen3-32b", "cluster=h100x64", *words]).model


def test_shipped_recipes_reach_limis_longest():
    for name in ("qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "glm4.5-air", "glm4.5"):
        check_context(compose_recipe([f"model={name}"]).model, 152 * 1024)


def test_beyond_the_native_context_a_decision_is_asked_for():
    m = model("model.rope=native", "model.rope_factor=1")
    check_context(m, 32_768)
    with pytest.raises(
        ConfigError, match=r"40,000 tokens, .* reaches 32,768 .*model\.rope=yarn model\.rope_factor=1\.23, or"
    ):
        check_context(m, 40_000)
    check_context(model("model.rope=unscaled", "model.rope_factor=1"), 1_000_000)


def test_yarn_reaches_its_factor():
    m = model("model.rope_factor=4")
    check_context(m, 131_072)
    with pytest.raises(
        ConfigError, match=r"times model\.rope_factor 4\); write model\.rope=yarn model\.rope_factor=4\.01"
    ):
        check_context(m, 131_073)
