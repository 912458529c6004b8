"""How far a run has come: every state is told, a kill at any write leaves one of them, and nothing is done twice."""

import json
import shutil
import subprocess
import sys

import pytest

from launch.run import run_state
from launch.run.run_state import Reached
from launch.weights import hf_folder
from recipes.compose.recipe import compose_recipe
from recipes.errors import CheckpointError
from tests.conftest import REPO
from tests.launch.states import content, export, found, run_in, save
from tests.launch.support import limi

ENGINES = ["engine=megatron", "engine=slime"]
REST = list(Reached)[Reached.begun :]


@pytest.fixture
def made(root, tmp_path):
    """`run_in` with a name of the test's own, whose folder is gone after it."""
    runs = []

    def run(state, *words):
        recipe, run = run_in(state, root, f"run=state-{tmp_path.name}", *words)
        runs.append(run.root)
        return recipe, run

    yield run
    for folder in runs:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state", list(Reached))
def test_every_state_is_told_and_telling_changes_nothing(made, state, engine):
    recipe, run = made(state, engine)
    before = content(run.root) if run.root.exists() else {}
    assert run_state.of(recipe).reached is state
    assert (content(run.root) if run.root.exists() else {}) == before


def without_plan(run):
    (run.root / "plan.json").unlink()


def checkpoint_half_written(run):
    (run.root / "checkpoints" / "step_000020").rename(run.root / "checkpoints" / ".step_000020")


def checkpoint_damaged(run):
    (run.root / "checkpoints" / "step_000020" / "weights").write_text("21")


def checkpoint_without_its_word(run):
    (run.root / "checkpoints" / "iter_0000019" / "limi.json").unlink()
    (run.root / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()


def checkpoint_without_its_record(run):
    (run.root / "checkpoints" / "iter_0000019" / "limi.json").unlink()


def export_half_written(run):
    run.hf.rename(run.hf.with_name(".hf.killed"))


def export_lacks_a_file(run):
    (run.hf / "config.json").unlink()


def export_cut(run):
    next(run.hf.glob("*.safetensors")).write_bytes(b"")


def export_manifest_cut(run):
    path = run.hf / hf_folder.MANIFEST
    path.write_text(path.read_text()[:50])


def export_of_an_earlier_step(run):
    path = run.hf / hf_folder.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": "step_000010"}))


def check_ended_early(run):
    (run.root / run_state.MARK).unlink()


def checked_again_and_ended_early(run):
    found(run)


def checked_and_exported_again(run):
    path = run.hf / hf_folder.MANIFEST
    path.write_text(path.read_text() + "\n")


def mark_cut(run):
    (run.root / run_state.MARK).write_text("{")


@pytest.mark.parametrize(
    ("state", "interrupt", "left"),
    [
        (Reached.begun, without_plan, Reached.nothing),
        (Reached.trained, checkpoint_half_written, Reached.begun),
        (Reached.trained, checkpoint_damaged, Reached.begun),
        (Reached.trained, checkpoint_without_its_word, Reached.begun),
        (Reached.trained, checkpoint_without_its_record, Reached.trained),
        (Reached.exported, export_half_written, Reached.trained),
        (Reached.passed, export_lacks_a_file, Reached.trained),
        (Reached.passed, export_cut, Reached.trained),
        (Reached.passed, export_manifest_cut, Reached.trained),
        (Reached.exported, export_of_an_earlier_step, Reached.trained),
        (Reached.passed, check_ended_early, Reached.exported),
        (Reached.passed, checked_again_and_ended_early, Reached.exported),
        (Reached.passed, checked_and_exported_again, Reached.exported),
        (Reached.failed, mark_cut, Reached.exported),
    ],
)
def test_what_is_not_whole_does_not_count(made, state, interrupt, left):
    slime = interrupt in (checkpoint_without_its_word, checkpoint_without_its_record)
    recipe, run = made(state, ENGINES[slime])
    interrupt(run)
    assert run_state.of(recipe).reached is left


def test_of_a_damaged_last_checkpoint_the_one_before_it_is_gone_on_from(made):
    recipe, run = made(Reached.begun)
    save(run, 10)
    save(run, 20)
    checkpoint_damaged(run)
    there = run_state.of(recipe)
    assert (there.reached, there.completed, there.steps) == (Reached.begun, 10, 20)
    assert there.next == f"goes on from {run.root / 'checkpoints' / 'step_000010'}, step 10 of 20"


def test_a_bit_of_the_export_is_missed_only_where_it_is_read(made):
    recipe, run = made(Reached.failed)
    path = next(run.hf.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert run_state.of(recipe).reached is Reached.failed
    assert run_state.of(recipe, read=True).reached is Reached.trained


@pytest.mark.parametrize("state", [Reached.exported, Reached.failed, Reached.passed])
def test_the_checkpoints_of_an_exported_run_may_go(made, state):
    recipe, run = made(state)
    shutil.rmtree(run.root / "checkpoints")
    assert run_state.of(recipe).reached is state
    assert run_state.of(recipe, read=True).reached is state


@pytest.mark.parametrize("spoil", [lambda run: None, checkpoint_damaged])
def test_a_trained_run_with_nothing_whole_left_is_refused_and_not_trained_again(made, spoil):
    recipe, run = made(Reached.passed)
    spoil(run)
    if spoil is not checkpoint_damaged:
        shutil.rmtree(run.root / "checkpoints")
    save(run, 10)
    export_lacks_a_file(run)
    with pytest.raises(
        CheckpointError, match=r"is trained.*\(config\.json is missing\).*put either back; or write anew=true"
    ):
        run_state.of(recipe)


def test_the_export_is_of_the_recipe_s_mtp_layers(made):
    recipe, _ = made(Reached.passed, "model=glm4.5-tiny")
    assert run_state.of(recipe).reached is Reached.passed
    dropped = compose_recipe([*recipe.overrides, "model.mtp=drop"])
    assert run_state.of(dropped).reached is Reached.trained
    assert (
        run_state.of(compose_recipe([f"run={recipe.run}", "model=qwen3-tiny", *recipe.overrides[:1]])).reached
        is Reached.passed
    )


def test_an_export_of_an_earlier_step_is_not_the_run_s(made):
    recipe, run = made(Reached.begun)
    save(run, 10)
    export(run, 10)
    assert run_state.of(recipe).reached is Reached.begun


@pytest.mark.run
@pytest.mark.parametrize("engine", ENGINES)
def test_a_dry_run_says_what_would_be_done(made, engine):
    recipe, run = made(Reached.failed, engine)
    before = content(run.root)
    words = [*recipe.overrides, "dry_run=true"]
    assert (
        f"{recipe.run} is trained and exported (20 steps, nothing of which is trained again): checks the export again; failed checks: "
        in (limi("train", *words).stdout)
    )
    assert "is refused: " in limi("train", *words, "optim.lr=0.5").stdout
    assert f"trains from the first step, and '{run.root}' moves aside" in limi("train", *words, "anew=true").stdout
    assert content(run.root) == before


def test_a_dry_run_claims_nothing_of_a_folder_that_is_not_here():
    words = ["run=far", "cluster.root=/no/such/root", "cluster.address=http://head:8265", "dry_run=true"]
    done = limi("train", *words)
    assert (
        "far goes on from what is in '/no/such/root/runs/far' of the cluster, which this machine does not see"
        in done.stdout
    )


QUICK = """
import sys
sys.argv[0] = "launch/limi.py"
sys.path.insert(0, ".")
from launch import limi
status = limi.main(sys.argv[1:])
assert not [m for m in sys.modules if m.partition(".")[0] in ("ray", "torch", "megatron", "transformers")]
sys.exit(status)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_finished_run_is_left_as_it_is_though_its_base_is_gone(tmp_path, engine):
    recipe, run = run_in(Reached.passed, tmp_path, "run=done", engine)
    shutil.rmtree(recipe.model.checkpoint)
    shutil.rmtree(recipe.data.out)
    before = content(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", QUICK, "train", *recipe.overrides], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "done is finished (20 steps" in done.stdout and "loss 6.6000 → 6.6000, held-out loss 6.5000" in done.stdout
    assert f"report: {run.root / 'report.html'}   checkpoint: {run.hf}" in done.stdout
    assert f"To check it again: `make sanity run=done cluster.root={tmp_path}`" in done.stdout
    assert "anew=true" in done.stdout and f"run=OTHER model.checkpoint={run.hf}" in done.stdout
    assert content(tmp_path) == before


@pytest.mark.run
@pytest.mark.parametrize("stage", ["sanity", "export", "replay", "check", "slurm", "kuberay", "data", "rehearse"])
def test_only_training_takes_anew(stage, tmp_path):
    done = limi(stage, "model=qwen3-tiny", f"cluster.root={tmp_path}", "anew=true")
    assert done.returncode == 2
    assert (
        f"anew=true is of `make train` alone, which trains a run again from its first step; {stage} does not; leave"
        in done.stderr
    )
    assert not list(tmp_path.iterdir())
