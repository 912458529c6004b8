"""What no scheduler can run is refused by each of them."""

import pytest

from launch.cluster.schedulers.kuberay import kuberay
from launch.cluster.schedulers.slurm import slurm
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError


@pytest.mark.parametrize("scheduler", [slurm, kuberay])
@pytest.mark.parametrize(
    ("words", "says"),
    [(["cluster.root=/x"], "write cluster=h100x8"), (["cluster=h100x8"], "write cluster.root=FOLDER")],
)
def test_what_no_scheduler_can_run_is_refused(scheduler, words, says):
    with pytest.raises(ConfigError, match=says):
        scheduler(compose_recipe(words))
