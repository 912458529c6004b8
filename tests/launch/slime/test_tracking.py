"""What a run through slime leaves for TensorBoard and W&B, and what it says of a failure that would come again."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.errors import TrainError
from tests.launch.slime.support import on_cpu
from tests.launch.slime.test_resume import folder, plan_of, train

pytestmark = pytest.mark.contract

SHORT = ["optim.epochs=1", "cluster.gpus_per_node=1", "engine.save_steps=100"]


@pytest.mark.slow
def test_tensorboard_has_the_steps_and_wandb_the_run_by_its_name(root, monkeypatch):
    on_cpu()
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)  # as in the environment that Ray is started in
    plan = plan_of(root, "slime-tracked", *SHORT, "engine.wandb=limi", "cluster.env.WANDB_MODE=offline")
    train(plan)
    run = folder(plan)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [e.step for e in board.Scalars("heldout_loss")] == [0, 5]
    of_slime = EventAccumulator(str(run / "tensorboard" / "slime"))
    of_slime.Reload()
    assert {"train/loss", "heldout/loss"} <= set(of_slime.Tags()["scalars"])
    # One by slime's driver, one by the trainer that has the figures.
    recorded = b"".join(p.read_bytes() for p in (run / "wandb").rglob("*.wandb"))
    assert b"slime-tracked" in recorded and b"train/loss" in recorded
    for path in run.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_failure_that_comes_again_is_tried_twice_and_no_more(root):
    plan = plan_of(root, "slime-hopeless", *SHORT, "engine.args.ckpt_format=no_such_format")
    with pytest.raises(TrainError, match="Failed twice with the same error after step 0; not retrying"):
        train(plan)
    log = (folder(plan) / "train.log").read_text()
    assert log.count("invalid choice: 'no_such_format'") == 2
