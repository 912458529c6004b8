"""`metrics.jsonl` as slime's log makes it."""

import logging
import time
from types import SimpleNamespace

import pytest

from launch import metrics
from launch.plan import Plan
from launch.slime import steps
from recipes.compose import run_folder
from recipes.errors import DivergedError, TrainError
from tests.launch.support import recipe_of


@pytest.fixture
def log(root):
    plan = Plan(*recipe_of(root, "run=logged", "cluster.gpus_per_node=2"))
    run_folder(plan.recipe).mkdir(parents=True, exist_ok=True)
    made = steps.Log(SimpleNamespace(), plan, 0)
    yield made
    logging.getLogger(steps._LOGGER).removeHandler(made)
    made.metrics.close()


def logged(text):
    logging.getLogger(steps._LOGGER).warning(text)


def test_a_step_s_time_is_without_the_held_out_loss_after_it(log):
    log.begin(1e-3)
    log.end(peak_gb=0.5)
    time.sleep(0.3)  # the held-out loss
    logged("step 0: {'train/loss': 2.0, 'train/grad_norm': 1.0}")
    (line,) = metrics.read(log.metrics.path)
    assert line["time"]["step_s"] < 0.2
    assert line["time"]["peak_gb"] == 0.5
    assert (line["step"], line["loss"], line["lr"]) == (1, 2.0, 1e-3)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_is_a_divergence(log, loss):
    log.heldout = {"step": 5, "heldout_loss": loss}
    with pytest.raises(
        DivergedError, match=f"held-out loss {loss} after step 5, which is not finite; try a smaller optim.lr"
    ):
        log.flush()


def test_a_step_that_is_not_finite_or_leaps_is_a_divergence(log):
    log.begin(1e-3)
    logged("step 0: {'train/loss': 2.0, 'train/grad_norm': 1.0}")
    with pytest.raises(DivergedError, match=r"step 2: .*over engine\.spike=5\.0 times"):
        logged("step 1: {'train/loss': 10.1, 'train/grad_norm': 1.0}")
    with pytest.raises(DivergedError, match="is not finite"):
        logged("step 2: {'train/loss': nan, 'train/grad_norm': 1.0}")


def test_figures_that_are_no_numbers_are_no_divergence(log):
    log.begin(1e-3)
    with pytest.raises(TrainError, match="this slime is not the pinned one") as raised:
        logged("step 0: {'train/loss': tensor(2.0, device='cuda:0'), 'train/grad_norm': 1.0}")
    assert not isinstance(raised.value, DivergedError)
