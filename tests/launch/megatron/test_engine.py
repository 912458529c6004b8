"""The driver, with one real rank behind it."""

import contextlib
import io
import json
import os
import signal

import pytest
from rich.console import Console

from launch.megatron import engine
from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.run.run_plan import Plan
from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.errors import TrainError
from tests.launch.support import POOL, exported, metrics_of, ranks_of, recipe_of


@pytest.mark.slow
def test_an_export_carries_the_yarn_it_was_trained_with(root, tmp_path):
    words = ["cluster.gpus_per_node=1", "model.native_context=512", "model.rope=yarn", "model.rope_factor=4"]
    with ranks_of(root, *words) as (plan, ranks):
        exported(plan, ranks, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == {
        "rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    assert config["max_position_embeddings"] == 2048
    assert SafetensorsFolder(tmp_path / "hf").files


def test_a_signal_that_ends_the_ranks_too_is_not_tried_again(root, tmp_path):
    recipe, data, _ = recipe_of(root, f"run=gone-{tmp_path.name}", "cluster.gpus_per_node=1")
    run = RunFolder(recipe, data, None)
    run.root.mkdir(parents=True)

    class Gone:
        def call(self, name, *_):
            os.kill(os.getpid(), signal.SIGTERM)
            raise TrainError("rank 0 died")

    log = metrics.Metrics(run.root, 0)
    with (
        contextlib.closing(log),
        pytest.raises(KeyboardInterrupt, match="^SIGTERM ended the ranks in step 1; run the same"),
    ):
        engine._steps(Plan(recipe, data, None), run, Gone(), log, 0, lambda line: None)


@pytest.mark.slow
def test_without_held_out_trajectories_it_trains_all_the_same(root):
    """LIMI has none."""
    POOL.close()
    words = ["run=without-heldout", "cluster.gpus_per_node=1", "optim.epochs=1", "optim.eval_steps=1"]
    recipe, data, _ = recipe_of(root, *words)
    recipe.data.heldout = None
    plan = Plan(recipe, data, None)
    run = RunFolder(recipe, data, None)
    assert engine.train_embedded(plan, run, Console(file=io.StringIO()))
    lines = metrics_of(run.root)
    assert [line["step"] for line in lines] == list(range(1, plan.schedule.num_steps + 1))
    assert not any("heldout_loss" in line for line in lines)
    assert run.checkpoint(plan.schedule.num_steps)
