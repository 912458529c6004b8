import pytest

from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from recipes.layout import batch_multiple, stage_layers


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose_recipe(list(words))
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.tp=3"], "does not divide the 4 attention heads; write layout.tp=2"),
        (
            ["layout.cp=3"],
            "does not divide 2 ranks (cluster.nodes 1 x cluster.gpus_per_node 2); write cluster.gpus_per_node=3, or layout.cp=1",
        ),
        (["layout.dp=4"], "layout.dp=2"),
        (["layout.tp=4", "cluster.gpus_per_node=4"], "does not divide the 2 key-value heads; write layout.tp=2"),
        (["layout.sp=true"], "layout.sp=false, or layout.tp=2"),
        (["layout.vpp=2"], "needs a pipeline"),
        (["layout.pp=2", "layout.vpp=3"], "does not divide the 4 layers"),
        (["layout.ep=2"], "has none; write layout.ep=1"),
        (["layout.etp=2"], "has none; write layout.etp=1"),
        (["layout.tp=2", "model.vocab=1023"], "vocabulary"),
        (["layout.tp=2", "model.ffn=191"], "191 columns of the MLP"),
        (
            ["layout.pp=2", "model.layers=5"],
            "write layout.pp=1, or layout.last_stage_layers=2",
        ),
        (["layout.first_stage_layers=1"], "need a pipeline"),
        (
            ["layout.pp=2", "layout.first_stage_layers=1", "layout.last_stage_layers=2"],
            "leave 1 of 4 layers to 0 stages, which cannot share them equally",
        ),
        (["layout.pp=2", "layout.vpp=2", "layout.first_stage_layers=2"], "write layout.vpp=1"),
        (["layout.optimizer_state=precision_aware", "engine.dtype=bf16"], "write layout.optimizer_state=offloaded"),
        (["layout.offload=true"], "write layout.recompute=linear"),
        (["layout.offload=true", "layout.recompute=selective"], "write layout.recompute=linear"),
        (["engine=slime", "layout.recompute=linear"], "layout.recompute=full, or engine=megatron"),
        (["engine=slime", "layout.recompute=full", "layout.offload=true"], "layout.offload=false"),
        (["gpu=h100", "engine.dtype=fp32"], "write engine.dtype=bf16"),
        (["gpu=h100", "layout.cp=2"], "write layout.cp=1 layout.tp=2, or engine=slime"),
    ],
)
def test_dense_rules(words, says):
    assert says in refused(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.ep=3", "cluster.gpus_per_node=3"], "does not divide the 4 experts; write layout.ep=1"),
        (["layout.ep=4"], "does not divide 2 ranks"),
        (["layout.tp=2"], "layout.sp=true"),
        (["cluster.gpus_per_node=4", "layout.tp=2", "layout.sp=true", "layout.etp=2"], "does not run on gloo"),
        (["layout.ep=1", "layout.etp=2"], "does not run on gloo"),
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
        ["model=glm4.5-tiny", "layout.tp=2", "layout.sp=true", "layout.ep=1"],
        ["model=glm4.5-tiny", "cluster.gpus_per_node=4", "layout.cp=2"],
    ],
)
def test_layouts_that_run_are_accepted(words):
    compose_recipe(words)


def test_stages_hold_the_layers_that_megatron_gives_them():
    def layers(*words):
        r = compose_recipe(["model.layers=8", *words])
        return [[(c.start, c.stop) for c in stage] for stage in stage_layers(r.model, r.layout)]

    assert layers("layout.pp=2") == [[(0, 4)], [(4, 8)]]
    assert layers("layout.pp=2", "layout.vpp=2") == [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]
    assert layers("layout.pp=2", "layout.last_stage_layers=3") == [[(0, 5)], [(5, 8)]]
    four = ["layout.pp=4", "cluster.gpus_per_node=4", "layout.first_stage_layers=1", "layout.last_stage_layers=3"]
    assert layers(*four) == [[(0, 1)], [(1, 3)], [(3, 5)], [(5, 8)]]


def test_slime_pads_to_128_a_rank_and_tp():
    r = compose_recipe(["model=qwen3-32b", "layout=released-qwen3"])
    assert batch_multiple(r.layout, r.engine.name) == 128 * 8 * 2


SLIME = ["model=glm4.5-air", "layout=released-glm4.5-air"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.ep=1"], "write layout.etp=8, or layout.ep=2"),
        (["engine.dtype=fp32"], "write engine.dtype=bf16"),
        (["cluster.nodes=1"], "write cluster.nodes=8, or layout.pp=1 layout.cp=1 layout.ep=8"),
        (["layout.pp=23"], "write cluster.nodes=92, or layout.pp=1"),
    ],
)
def test_rules_of_a_cluster(words, says):
    assert says in refused(*SLIME, *words)
