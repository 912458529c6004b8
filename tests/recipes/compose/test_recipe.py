import pytest

from recipes.compose.options import leaves
from recipes.compose.recipe import compose_recipe, from_yaml, to_yaml
from recipes.config import Family
from recipes.errors import ConfigError


def test_default_recipe_is_the_tiny_qwen3_on_two_local_ranks():
    r = compose_recipe([])
    assert (r.model.name, r.run, r.cluster.gpus_per_node) == ("qwen3-tiny", "qwen3-tiny", 2)
    assert r.model.family is Family.qwen3


def test_a_model_brings_its_layout_and_the_command_line_wins():
    assert compose_recipe(["model=glm4.5-tiny"]).layout.ep == 2
    assert compose_recipe(["model=glm4.5-tiny", "layout=data_parallel"]).layout.ep == 1
    assert compose_recipe(["model=glm4.5-tiny", "layout.ep=1"]).layout.ep == 1


@pytest.mark.parametrize(
    "value",
    [
        "/plain",
        "/with space",
        "a,b",
        "[1,2]",
        "{a:1}",
        "it's",
        'say "x"',
        "a=b",
        "#1",
        "(x",
        "$HOME",
        r"back\slash",
        "ü",
        "1e3",
        "007",
        "true",
    ],
)
def test_text_reaches_the_recipe_as_typed(value):
    assert compose_recipe([f"data.path={value}"]).data.path == value


def test_environment_of_ranks_takes_any_name():
    assert compose_recipe(["cluster.env.NCCL_DEBUG=INFO"]).cluster.env == {"NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.lrr=1"], "'optim.lr'"),
        (["lr=1"], "'optim.lr'"),
        (["MODLE=qwen3-4b"], "'model'"),
        (["CLUSTER=h100x8"], "write cluster=h100x8"),
        (["HF_ENDPOINT=x"], "before the command: HF_ENDPOINT=x make"),
        (["+optim.lr=1"], "optim.lr=1"),
        (["+brand_new=1"], "unknown option"),
        (["++optim.lr=1"], "unknown option"),
        (["~optim.lr=1"], "unknown option"),
        (["optim.lr=fast"], "optim.lr=fast is not a number; write optim.lr=X, a number"),
        (["optim.epochs=1.5"], "optim.epochs=1.5 is not a whole number; write optim.epochs=1 or optim.epochs=2"),
        (["optim.lr=0"], "optim.lr=0"),
        (["optim.lr=nan"], "optim.lr=nan"),
        (["optim.epochs=0"], "optim.epochs=1 or more"),
        (["optim.min_lr_ratio=2"], "optim.min_lr_ratio"),
        (["optim.lr=1,2"], "optim.lr"),
        (["model.rope_factor=2"], "model.rope=native; write model.rope_factor=1, or model.rope=yarn"),
        (["model.rope=yarn"], "model.rope_factor=1; write model.rope_factor=19.0 for data.max_tokens=155648"),
        (["model.rope=yarn", "model.rope_factor=nan"], "model.rope_factor=nan; write"),
        (["model.rope=yarn", "data.max_tokens=8192"], "write model.rope=native model.rope_factor=1"),
        (["model.native_context=0"], "model.native_context=1 or more"),
        (["layout.recompute=ful"], "none, selective, linear, full"),
        (["model=qwen3-tinny"], "model=qwen3-tiny"),
        (["cluster=lokal"], "cluster=local"),
        (["run=../evil"], "run='../evil'"),
        (["run="], "run=''"),
        (["cluster.root=relative"], "cluster.root=/"),
        (["optim.lr"], "not name=value"),
    ],
)
def test_wrong_words_are_refused_with_what_to_type(words, says):
    with pytest.raises(ConfigError) as error:
        compose_recipe(words)
    assert says in str(error.value)
    assert "+optim" not in str(error.value).replace("'+optim", "").replace("'++optim", ""), (
        "Hydra's advice to use + is dropped"
    )


def test_every_leaf_has_a_type():
    assert leaves()["optim.lr"] is float


def test_a_value_that_must_be_given_is_asked_for():
    with pytest.raises(ConfigError, match=r"data\.path is not set; write data\.path=VALUE"):
        compose_recipe(["data=openai"])


def test_a_run_of_an_earlier_version_calls_its_overrides_words(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose_recipe(["optim.lr=1e-5"])).replace("overrides:", "words:"))
    assert from_yaml(path).overrides == ["optim.lr=1e-5"]
