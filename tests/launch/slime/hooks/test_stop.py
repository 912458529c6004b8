"""A stop ends slime's own loop after a step, saved, and never elsewhere."""

import sys
from types import ModuleType

import pytest

from launch.slime.hooks import stop


@pytest.fixture
def misc(monkeypatch):
    """Stand in for slime's module, with its answer at 624b824."""

    def due(rollout_id, interval, num_rollout_per_epoch=None, num_rollout=None):
        if interval is None:
            return False
        if num_rollout is not None and rollout_id == num_rollout - 1:
            return True
        return (rollout_id + 1) % interval == 0

    slime, utils, module = ModuleType("slime"), ModuleType("slime.utils"), ModuleType("slime.utils.misc")
    module.should_run_periodic_action, utils.misc = due, module
    for one in (slime, utils, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


def loop(misc, run, steps, save_interval, request_in=None):
    """Run the loop of slime's `train_async.py`. Return the steps done, those saved, and the exit status."""
    done, saved = [], []
    try:
        for rollout_id in range(steps):
            if rollout_id == request_in:
                (run / stop.REQUEST).touch()
            done.append(rollout_id)
            if misc.should_run_periodic_action(rollout_id, save_interval, None, steps):
                saved.append(rollout_id)
            misc.should_run_periodic_action(rollout_id, None, None)
    except SystemExit as ended:
        return done, saved, ended.code
    return done, saved, 0


def test_without_a_request_slime_s_own_answers_stand(misc, tmp_path):
    stop.install(tmp_path)
    assert loop(misc, tmp_path, 7, 3) == ([*range(7)], [2, 5, 6], 0)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_request_saves_after_the_step_that_runs_and_ends(misc, tmp_path, step):
    stop.install(tmp_path)
    earlier = [s for s in (2, 5) if s < step]
    assert loop(misc, tmp_path, 7, 3, step) == ([*range(step + 1)], [*earlier, step], stop.STATUS)


def test_a_request_in_the_last_step_changes_nothing(misc, tmp_path):
    stop.install(tmp_path)
    assert loop(misc, tmp_path, 7, 3, 6) == ([*range(7)], [2, 5, 6], 0)


def test_what_saves_nothing_ends_without_a_save(misc, tmp_path):
    stop.install(tmp_path)
    assert loop(misc, tmp_path, 7, None, 3) == ([0, 1, 2, 3], [], stop.STATUS)
