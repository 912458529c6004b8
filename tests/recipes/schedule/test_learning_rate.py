import pytest

from recipes.compose.recipe import compose_recipe
from recipes.schedule.learning_rate import learning_rate


def rates(steps: int, **optim: object) -> list[float]:
    recipe = compose_recipe([f"optim.{k}={v}" for k, v in optim.items()])
    return [learning_rate(recipe.optim, step, steps) for step in range(steps)]


def test_warms_up_from_above_zero_to_the_peak_and_ends_at_the_floor():
    r = rates(20, lr=1e-3, warmup_steps=4, min_lr_ratio=0.1)
    assert r[0] == pytest.approx(2e-4)
    assert max(r) == r[4] == pytest.approx(1e-3)
    assert r[-1] == pytest.approx(1e-4)
    assert r[4:] == sorted(r[4:], reverse=True)


def test_a_single_step_runs_at_the_peak():
    assert rates(1, lr=1e-3, warmup_steps=0) == [1e-3]


def test_a_warm_up_fraction_is_counted_as_megatron_does():
    """Four steps of slime with `--lr-warmup-fraction 0.9` ran at these rates."""
    assert rates(4, lr=1e-5, warmup_steps=2, warmup_fraction=0.9) == pytest.approx(
        [0, 2.8e-6, 5.6e-6, 8.3e-6], rel=0.01
    )
    assert rates(4, lr=1e-5, warmup_steps=0, warmup_fraction=0.5)[2] == 1e-5
