import json

import pytest

from recipes.checkpoint.checkpoint_config import check_checkpoint, differences, exported
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, Fault
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
        assert any(field in fault.problem for fault in differences(m, config | {field: other})), field


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
def test_the_tiny_models_are_theirs(bases, name):
    recipe = compose_recipe([f"model={name}", f"model.checkpoint={bases[name]}"])
    check_checkpoint(recipe.model)
    recipe.model.kv_heads *= 2
    with pytest.raises(
        ConfigError,
        match=r"num_key_value_heads is 2, the recipe says 4\nwrite model\.kv_heads=2, or",
    ):
        check_checkpoint(recipe.model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear', only"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"new_kind_of_attention": 1}, "unknown field new_kind_of_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_parameters.rope_type is 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}}, "unknown field rope_parameters.mrope_section"),
    ],
)
def test_what_cannot_be_trained_is_named(bases, change, says):
    m = compose_recipe([f"model.checkpoint={bases['qwen3-tiny']}"]).model
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    assert any(says in fault.problem for fault in differences(m, config | change))


@pytest.mark.parametrize("word", ["model.experts=4", "model.mtp_layers=1"])
def test_what_the_family_does_not_have_is_refused(bases, word):
    m = compose_recipe([f"model.checkpoint={bases['qwen3-tiny']}", word]).model
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    name, count = word.split("=")
    says = f"qwen3 has no {name.removeprefix('model.')}, the recipe says {count}"
    assert differences(m, config) == [Fault(says, f"{name}=0")]


def test_a_missing_field_and_a_missing_file(bases, tmp_path):
    m = compose_recipe([f"model.checkpoint={tmp_path}"]).model
    with pytest.raises(ConfigError, match="no config.json"):
        check_checkpoint(m)
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    del config["head_dim"]
    assert differences(m, config) == [Fault("head_dim is missing, the recipe says model.head_dim=24")]


YARN = ["model.rope=yarn", "model.rope_factor=4.75", "model.native_context=4096"]
SETTINGS = {"factor": 4.75, "original_max_position_embeddings": 4096}


def old_form(config):
    """As libraries before transformers 5 write it."""
    rope = config["rope_parameters"]
    plain = {k: v for k, v in config.items() if k != "rope_parameters"}
    return plain | {k: v for k, v in rope.items() if k != "rope_type"} | {"rope_scaling": None}


@pytest.fixture(params=["rope_parameters", "rope_scaling"])
def base(request, bases):
    """The tiny base's `config.json`, unscaled, in the new form and in the old one."""
    config = json.loads((bases["qwen3-tiny"] / "config.json").read_text())
    return config if request.param == "rope_parameters" else old_form(config)


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
@pytest.mark.parametrize("form", [dict, old_form])
def test_an_export_says_its_yarn_to_transformers_and_can_be_trained_further(bases, tmp_path, name, form):
    from transformers import AutoConfig

    base = form(json.loads((bases[name] / "config.json").read_text()))
    m = compose_recipe([f"model={name}", *YARN]).model
    assert differences(m, base) == [], "from an unscaled base"
    config = exported(m, base)
    assert differences(m, config) == [], "from an export"
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    partial = {"partial_rotary_factor": 0.5} if name == "glm4.5-tiny" else {}
    assert read.rope_parameters == {"rope_type": "yarn", "rope_theta": 1e4, **SETTINGS, **partial}
    assert read.max_position_embeddings == 19456
    changed = {"rope_parameters", "rope_scaling", "max_position_embeddings"}
    assert {k: v for k, v in config.items() if k not in changed} == {k: v for k, v in base.items() if k not in changed}


@pytest.mark.parametrize("rope", ["native", "unscaled"])
def test_an_export_without_yarn_is_the_base_to_the_letter(base, rope):
    assert exported(compose_recipe([f"model.rope={rope}"]).model, base) == base


def test_layers_that_are_dropped_are_not_announced(bases):
    config = json.loads((bases["glm4.5-tiny"] / "config.json").read_text())
    m = compose_recipe(["model=glm4.5-tiny", "model.mtp=drop"]).model
    assert exported(m, config) == config | {"num_nextn_predict_layers": 0}


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("length", [8192, 19456])
def test_the_recipes_own_yarn_fits_in_old_and_new_words(bases, kind, length):
    config = old_form(json.loads((bases["qwen3-tiny"] / "config.json").read_text()))
    config |= {"rope_scaling": {kind: "yarn", **SETTINGS, "beta_fast": 32.0}, "max_position_embeddings": length}
    assert differences(compose_recipe(YARN).model, config) == []


@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        (YARN, {"factor": 4.0}, "factor is 4.0, the recipe says 4.75; model.rope_factor=4.0"),
        (YARN, {"original_max_position_embeddings": 2048}, "the recipe says 4096; model.native_context=2048"),
        (YARN, {"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        (YARN, {"rope_type": "linear"}, "rope_type is 'linear', only 'default' and 'yarn' can be trained"),
        (YARN, {"beta_fast": 16}, "beta_fast is 16, only 32 can be trained"),
        (YARN, {"attention_factor": 1.0}, "attention_factor is 1.0, only None can be trained"),
        (YARN, {"long_factor": [1.0]}, "unknown field rope_parameters.long_factor"),
        ([], {}, "rope_type is yarn, the recipe says native; model.rope=yarn"),
        ([], {}, "factor is 4.75, the recipe says 1.0; model.rope_factor=4.75"),
        (["model.rope=unscaled"], {}, "rope_type is yarn, the recipe says unscaled; model.rope=yarn"),
    ],
)
def test_another_scaling_is_refused(bases, words, change, says):
    config = exported(compose_recipe(YARN).model, json.loads((bases["qwen3-tiny"] / "config.json").read_text()))
    rope = {k: v for k, v in (config["rope_parameters"] | change).items() if v is not None}
    found = differences(compose_recipe(words).model, config | {"rope_parameters": rope})
    lines = [str(fault) for fault in found]
    assert any(line.startswith(("rope_parameters.", "unknown field rope_")) and says in line for line in lines), found


def test_another_length_than_the_release_and_than_yarn_reaches_is_refused(base):
    m = compose_recipe(YARN).model
    config = exported(m, base)
    assert differences(m, base | {"max_position_embeddings": 19456}) != [], "without the scaling that reaches it"
    says = Fault("max_position_embeddings is 16384, the recipe says 8192", "model.max_position=16384")
    assert differences(m, config | {"max_position_embeddings": 16384}) == [says]
