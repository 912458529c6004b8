"""A rehearsal writes into a folder of its own, and into no other."""

import pytest
from rich.console import Console

from launch.run.run_plan import Plan
from launch.run.run_state import Reached
from launch.slime import rehearsal
from recipes.errors import ConfigError
from tests.launch.states import content, run_in
from tests.launch.support import recipe_of


def test_a_run_that_lies_where_a_rehearsal_would_is_not_removed(root):
    _, run = run_in(Reached.passed, root, "run=mine-rehearsal", "engine=slime")
    before = content(run.root)
    plan = Plan(*recipe_of(root, "engine=slime", "run=mine"))
    with pytest.raises(
        ConfigError, match=r"mine-rehearsal' holds a run, but a rehearsal of run=mine needs .*write run=OTHER"
    ):
        rehearsal.rehearse(plan, Console(quiet=True))
    assert content(run.root) == before
