import pytest

from recipes.compose import compose_recipe
from recipes.errors import ConfigError


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose_recipe(list(words))
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.tp=3"], "does not divide 2 ranks"),
        (["layout.dp=4"], "layout.dp=2"),
        (["layout.tp=4", "cluster.gpus_per_node=4"], "does not divide the 2 key-value heads; write layout.tp=2"),
        (["layout.sp=true"], "layout.sp=false or layout.tp=2"),
        (["layout.vpp=2"], "needs a pipeline"),
        (["layout.pp=2", "layout.vpp=3"], "does not divide the 4 layers"),
        (["layout.ep=2"], "has none; write layout.ep=1"),
        (["layout.etp=2"], "has none; write layout.etp=1"),
        (["layout.tp=2", "model.vocab=1023"], "vocabulary"),
    ],
)
def test_dense_rules(words, says):
    assert says in refused(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.ep=3", "cluster.gpus_per_node=3"], "does not divide the 4 experts; write layout.ep=2"),
        (["layout.ep=4"], "does not divide 2 ranks"),
        (["layout.tp=2"], "layout.sp=true"),
        (["layout.tp=2", "layout.sp=true", "layout.ep=1"], "trains wrongly without an error"),
        (["cluster.gpus_per_node=4", "layout.tp=2", "layout.sp=true", "layout.etp=2"], "does not run on gloo"),
    ],
)
def test_expert_rules(words, says):
    assert says in refused("model=glm4.5-tiny", *words)


@pytest.mark.parametrize(
    "words",
    [
        ["layout.tp=2"],
        ["layout.tp=2", "layout.sp=true"],
        ["layout.pp=2", "layout.vpp=2"],
        ["layout.cp=2"],
        ["cluster.gpus_per_node=8", "layout.tp=2", "layout.pp=2", "layout.cp=2"],
        ["model=glm4.5-tiny", "layout.tp=2", "layout.sp=true"],
        ["model=glm4.5-tiny", "cluster.gpus_per_node=4", "layout.cp=2"],
    ],
)
def test_layouts_that_run_are_accepted(words):
    compose_recipe(words)
