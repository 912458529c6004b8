"""Whatever is killed, and whenever: the run that completes is the uninterrupted one."""

import random

import pytest

from tests.launch import kill
from tests.launch.support import alive, descendants, finish, metrics_of, start, wait_for_step


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_no_step():
    for outcome in kill.run(50):
        print(outcome.table())
    assert outcome.kills.total() == 50
    assert {target for target, _ in outcome.kills} == set(kill.TARGETS)
    assert {phase for _, phase in outcome.kills} >= {"data", "start", "step", "save"}
    assert outcome.equal == outcome.runs
    assert outcome.left_over == []


@pytest.mark.run
@pytest.mark.parametrize("target", ["driver", pytest.param("raylet", marks=pytest.mark.slow)])
def test_what_is_killed_in_a_step_goes_on_exactly(root, uninterrupted, target):
    """The driver, or Ray, whose end the ranks notice within seconds, in which short steps go on. A rank's: test_resume.py."""
    run = root / "runs" / f"killed-{target}"
    process = start(root, f"run=killed-{target}")
    wait_for_step(run, 8, process)
    ranks = [p for p in descendants(process.pid) if "ray::Worker" in " ".join(p.cmdline())]
    assert kill.kill(process, target, random.Random(0))
    code, output = finish(process)
    assert not alive(ranks)
    if target == "driver":
        code, output = finish(start(root, f"run=killed-{target}"))
        assert "going on from" in output and "step_000006" in output
    assert code == 0, output
    assert metrics_of(run) == uninterrupted, "bit for bit"
