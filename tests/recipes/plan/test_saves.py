"""When a run saves, and what that takes: never fewer than four checkpoints by default, and the last one without optimizer state."""

import pytest

from recipes.compose.recipe import compose_recipe
from recipes.dimensions import parameters
from recipes.plan.saves import save_interval, saves, saves_optimizer

DENSE = ["model=qwen3-4b"]


@pytest.mark.parametrize(
    ("steps", "interval", "count"),
    [(1, 1, 1), (3, 1, 3), (4, 1, 4), (7, 1, 7), (20, 5, 4), (399, 99, 5), (400, 100, 4), (5000, 100, 50)],
)
def test_a_run_has_four_checkpoints_or_one_every_step(steps, interval, count):
    r = compose_recipe(DENSE)
    found = saves(r, steps)
    assert (save_interval(r, steps), found.interval, found.count) == (interval, interval, count)
    assert found.count >= min(4, steps)


def test_what_the_command_line_says_wins():
    r = compose_recipe([*DENSE, "engine.save_steps=7"])
    assert save_interval(r, 20) == 7 and saves(r, 20).count == 3


def test_a_checkpoint_is_fourteen_bytes_a_parameter_and_the_last_two():
    r = compose_recipe(DENSE)
    total, speed = parameters(r.model).total, r.cluster.disk_gb_s * 1e9
    found = saves(r, 20)
    assert (found.checkpoint, found.last, found.export) == (14 * total, 2 * total, 2 * total)
    assert found.seconds == 14 * total / speed
    assert found.all_seconds == pytest.approx((3 * 14 + 2 + 2) * total / speed)
    assert found.kept == (14 + 2 + 2) * total, "engine.keep_last=2, and the export"
    assert found.most == 3 * 14 * total, "a third one while it is being written"
    assert saves(compose_recipe([]), 20).seconds is None
    assert [saves_optimizer(r, done, 20) for done in (5, 19, 20)] == [True, True, False]


def test_weights_alone_take_two_bytes_a_parameter():
    r = compose_recipe([*DENSE, "engine.save=weights"])
    total = parameters(r.model).total
    found = saves(r, 20)
    assert found.checkpoint == found.last == 2 * total
    assert not saves_optimizer(r, 5, 20)
