import pytest

from recipes.compose import compose_recipe
from recipes.errors import ConfigError


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
