"""A step that diverges stops the run before it spoils anything, and can be repeated."""

import json
import math

import pytest

from data_prep.files import write_text
from launch.run.run_state import Reached
from recipes.compose.recipe import to_yaml
from tests.launch.states import run_in
from tests.launch.support import finish, limi, metrics_of, start

# A rate that throws the weights far off in one step; from step 2 on the loss is tens of times the first.
LEAP = ["optim.lr=3", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def leapt(root):
    """A run that stopped at its second step."""
    code, output = finish(start(root, "run=leap", *LEAP))
    assert code == 1, output
    return root / "runs" / "leap", output


def replay(root, *words):
    return limi("replay", f"cluster.root={root}", *words)


@pytest.mark.run
def test_a_leap_of_the_loss_stops_before_the_update_and_names_its_sequences(leapt):
    run, output = leapt
    record = json.loads((run / "diverged.json").read_text())
    assert "DivergedError: step 2: loss " in output
    assert "engine.spike=5.0 times the largest loss" in output
    assert f"inspect each sequence with `make replay run=leap STEP=2 cluster.root={run.parents[1]}`, or write" in output
    assert record["step"] == 2 and len(record["sequences"]) == 4
    assert all(s["id"] in output for s in record["sequences"])
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000001"]
    assert max(m["step"] for m in metrics_of(run)) == 1


@pytest.mark.slow
def test_a_replay_repeats_the_step_bit_for_bit_and_sequence_by_sequence(root, leapt):
    run, _ = leapt
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = replay(root, "run=leap", "step=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 steps before step 2" in done.stdout
    assert "the same in the run, bit for bit" in done.stdout
    for sequence in json.loads((run / "diverged.json").read_text())["sequences"]:
        assert sequence["id"] in done.stdout
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before, "a replay writes nothing"


@pytest.mark.run
def test_a_replay_takes_the_run_s_own_recipe_and_no_word_that_would_change_it(root, leapt):
    refused = replay(root, "run=leap", "step=2", "optim.lr=0.1")
    assert refused.returncode == 2
    assert (
        f"optim.lr: the recipe is the run's own, '{root}/runs/leap/config.yaml'; leave out all but run, step"
        in refused.stderr
    )
    beyond = replay(root, "run=leap", "step=21")
    assert beyond.returncode == 2 and "step=21: the run has steps 1 to 20" in beyond.stderr


@pytest.mark.run
@pytest.mark.parametrize(
    ("state", "engine", "says"),
    [
        (Reached.nothing, "engine=megatron", "no run has begun in '"),
        (
            Reached.begun,
            "engine=slime",
            "was trained through slime, and a replay is the embedded engine's; write run=NAME",
        ),
    ],
)
def test_what_has_no_steps_to_repeat_is_refused(root, state, engine, says):
    recipe, run = run_in(state, root, f"run=unreplayed-{state.name}", engine)
    write_text(run.root / "config.yaml", to_yaml(recipe))
    done = replay(root, f"run={recipe.run}", "step=1")
    assert done.returncode == 2 and says in done.stderr


@pytest.mark.slow
def test_the_same_words_stop_at_the_same_step_and_without_the_limit_the_run_goes_on(root, leapt):
    _, first = leapt
    code, again = finish(start(root, "run=leap", *LEAP))
    assert code == 1
    assert first[first.index("step 2: loss") :] == again[again.index("step 2: loss") :]
    code, output = finish(start(root, "run=leap", *LEAP, "engine.spike=null"))
    assert code == 0, output
    assert "step_000001" in output


@pytest.mark.slow
def test_a_replay_of_an_earlier_step_goes_up_to_it(root, leapt):
    """Step 9 of a run that kept no checkpoint but those of steps 6 and 12."""
    code, output = finish(start(root, "run=whole-replayed"))
    assert code == 0, output
    done = replay(root, "run=whole-replayed", "step=9")
    assert done.returncode == 0, done.stderr
    assert "step_000006, 2 steps before step 9" in done.stdout
    assert "the same in the run, bit for bit" in done.stdout
    refused = replay(root, "run=whole-replayed", "step=21")
    assert refused.returncode == 2 and "steps 1 to 20" in refused.stderr
    refused = replay(root, "run=no-such-run", "step=1")
    assert refused.returncode == 2 and "there is no run" in refused.stderr


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run(root):
    code, output = finish(start(root, "run=infinite", "optim.lr=1e36", "optim.warmup_steps=0"))
    assert code == 1, output
    assert "DivergedError: step 2: loss " in output and "which is not finite" in output
    run = root / "runs" / "infinite"
    assert all(math.isfinite(m["loss"]) for m in metrics_of(run) if "loss" in m)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000001"]
