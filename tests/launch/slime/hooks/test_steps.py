"""`metrics.jsonl` of what slime hands to its trackers."""

from types import SimpleNamespace

import pytest

from launch.run import metrics
from launch.run.run_plan import Plan
from launch.slime.hooks import steps
from recipes.errors import DivergedError
from recipes.paths import run_folder
from tests.launch.support import recipe_of


@pytest.fixture
def log(root):
    plan = Plan(*recipe_of(root, "run=logged", "cluster.gpus_per_node=2"))
    run_folder(plan.recipe).mkdir(parents=True, exist_ok=True)
    trackers.passed_on = []
    trackers.log = lambda args, metrics, step_key: trackers.passed_on.append((metrics, step_key))
    made = steps.Log(SimpleNamespace(), plan, 0, trackers)
    yield made
    made.metrics.close()


trackers = SimpleNamespace()  # slime's `logging_utils`


def told(step, loss, grad_norm=1.0):
    figures = {"train/loss": loss, "train/grad_norm": grad_norm, "train/step": step}
    trackers.log(SimpleNamespace(), figures, step_key="train/step")


def test_a_step_s_time_is_without_the_held_out_loss_after_it(log, monkeypatch):
    clock = iter([10.0, 10.1])
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    log.begin(1e-3)
    log.end(peak_gb=0.5)
    # The held-out loss takes its time here.
    told(0, 2.0)
    (line,) = metrics.read_metrics(log.metrics.path)
    assert line["time"]["step_s"] == pytest.approx(0.1)
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
    told(0, 2.0)
    with pytest.raises(DivergedError, match=r"step 2: .*above engine\.spike=5\.0 times"):
        told(1, 10.1)
    with pytest.raises(DivergedError, match="is not finite"):
        told(2, float("nan"))


def test_figures_reach_slimes_own_trackers_first(log):
    log.begin(1e-3)
    told(0, 2.0)
    log.heldout = {"step": 1, "heldout_loss": 2.5}
    told(1, 1.5)
    steps_of = [(key, metrics["train/step"]) for metrics, key in trackers.passed_on]
    assert steps_of == [("train/step", 0), ("train/step", 1), ("train/step", 1)]
    assert trackers.passed_on[-1][0] == {"heldout/loss": 2.5, "train/step": 1}
    trackers.log(SimpleNamespace(), {"rollout/step": 3}, step_key="rollout/step")
    assert log.completed == 2, "of other kinds nothing is counted"
