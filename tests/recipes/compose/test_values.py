import pytest

from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("engine.wandb=me", "engine.wandb=me is slime's, and the embedded engine does not read it; the same figures are in the run's "
         "tensorboard/ and metrics.jsonl; write engine.wandb=null, or engine=slime"),
        ("engine.slime_root=/x", "write engine.slime_root=null, or engine=slime"),
        ("engine.megatron_root=/x", "write engine.megatron_root=null, or engine=slime"),
        ("engine.python=/x", "write engine.python=null"),
        ("sanity.tp=2", "sanity.tp=2 needs GPUs, but gpu=cpu; write sanity.tp=null"),
        ("sanity.url=http://h:1 sanity.port=5", "sanity.url=http://h:1 is up already; write sanity.port=null"),
        ("engine=slime model.rope_base=10000.5", "write model.rope_base=10000, or engine=megatron"),
    ],
)  # fmt: skip
def test_an_option_that_nothing_would_read_is_refused_and_the_mend_helps(words, says):
    with pytest.raises(ConfigError) as error:
        compose_recipe(words.split())
    assert str(error.value).endswith(says)
    for fix in error.value.fix.removeprefix("write ").split(", or "):
        compose_recipe([*words.split(), fix])


def test_they_are_taken_where_they_are_read():
    compose_recipe(
        ["engine=slime", "engine.wandb=me", "engine.slime_root=/x", "engine.megatron_root=/y", "engine.python=/z"]
    )
    compose_recipe(["model=qwen3-4b", "cluster=h100x1", "engine.python=/z", "sanity.tp=1"])
    compose_recipe(["model.rope_base=10000.5"])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("gpu.memory_mib=0", "above 0"),
        ("cluster.network_gb_s=-1", "above 0"),
        ("cluster.host_memory_gb=0", "above 0"),
        ("gpu.matmul_efficiency=5", "above 0 and at most 1"),
        ("gpu.hour_price=nan", "gpu.hour_price=2.5"),
        ("optim.warmup_fraction=1", "optim.warmup_fraction=0.1"),
        ("cluster.env.WANDB_API_KEY=0123", "in the environment in which `ray start` runs"),
        ("model.heads=0", "model.heads=1 or more"),
        ("optim.copies=0", "optim.copies=1 or more"),
        ("layout.loss_chunk=0", "layout.loss_chunk=1 or more"),
    ],
)
def test_values_that_no_run_could_have_are_refused(word, says):
    with pytest.raises(ConfigError) as error:
        compose_recipe(["model=qwen3-4b", word])
    assert word.split("=")[0] in str(error.value) and says in str(error.value)
