import json

import pytest

from recipes.checkpoint_config import check_checkpoint, differences
from recipes.compose import compose_recipe
from recipes.errors import ConfigError
from tests.recipes.test_dimensions import model_of

PUBLISHED = ["qwen3-4b", "qwen3-8b", "qwen3-32b", "glm4.5-air", "glm4.5"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_models_are_the_published_ones(reference, name):
    config = json.loads((reference / "hf_configs" / name / "config.json").read_text())
    m = model_of(name)
    assert differences(m, config) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_a_published_configuration_is_checked(reference, name):
    """Whatever number or flag is changed in it, the change is named."""
    config = json.loads((reference / "hf_configs" / name / "config.json").read_text())
    m = model_of(name)
    for field, value in config.items():
        if field in ("architectures", "torch_dtype"):
            continue
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        assert any(field in line for line in differences(m, config | {field: other})), field


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
def test_the_tiny_models_are_theirs(bases, name):
    recipe = compose_recipe([f"model={name}", f"model.checkpoint={bases[name]}"])
    check_checkpoint(recipe.model)
    recipe.model.kv_heads *= 2
    with pytest.raises(ConfigError, match=r"num_key_value_heads is 2, the recipe says 4; write model\.kv_heads=2"):
        check_checkpoint(recipe.model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"new_kind_of_attention": 1}, "unknown field new_kind_of_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ],
)
def test_what_cannot_be_trained_is_named(bases, change, says):
    m = compose_recipe([f"model.checkpoint={bases['qwen3-tiny']}"]).model
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    assert any(says in line for line in differences(m, config | change))


def test_a_missing_field_and_a_missing_file(bases, tmp_path):
    m = compose_recipe([f"model.checkpoint={tmp_path}"]).model
    with pytest.raises(ConfigError, match="no config.json"):
        check_checkpoint(m)
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    del config["head_dim"]
    assert differences(m, config) == ["head_dim is missing; the recipe says model.head_dim=24"]
