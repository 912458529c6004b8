"""The planned steps inside slime, against the schedule; what is rebound, against slime's source where it is there."""

import ast
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from launch.plan import Plan
from launch.slime import job, rollout
from recipes.compose import from_yaml, to_yaml
from recipes.errors import TrainError
from tests.launch.support import recipe_of


@pytest.fixture(params=["", "layout.pp=2 layout.vpp=2 model.layers=4", "layout.cp=2 layout.max_tokens_per_gpu=1024"])
def here(request, root, tmp_path, monkeypatch):
    """A run folder of a small recipe on two or four data-parallel ranks, as a job finds it."""
    recipe, data, heldout = recipe_of(root, "cluster.gpus_per_node=4", *request.param.split())
    plan = Plan(recipe, data, heldout)
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    (tmp_path / "plan.json").write_text(json.dumps({"data": {"folder": str(data.folder)}}))
    monkeypatch.setenv(job.RUN, str(tmp_path))
    rollout.run.cache_clear()
    yield plan
    rollout.run.cache_clear()


@pytest.fixture
def slime(monkeypatch):
    """Stands in for the modules of slime that the functions import."""

    def build_dp_schedule(args, train_parallel_config, total_lengths, *, global_batch_size, rollout_indices):
        raise AssertionError("slime's own schedule ran")

    class Sample(SimpleNamespace):
        Status = SimpleNamespace(COMPLETED="completed")

    modules = {
        name: ModuleType(name)
        for name in ("slime", "slime.ray", "slime.ray.rollout", "slime.utils", "slime.utils.types")
    }
    modules["slime.ray.rollout"].build_dp_schedule = build_dp_schedule
    modules["slime"].ray, modules["slime.ray"].rollout = modules["slime.ray"], modules["slime.ray.rollout"]
    modules["slime.utils.types"].Sample = Sample
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["slime.ray.rollout"]


def scheduled(here, step, samples):
    """What slime's rollout manager makes of a step's samples, by `slime/ray/rollout.py`."""
    import slime.ray.rollout as module

    dp = here.schedule.dp
    return module.build_dp_schedule(
        None,
        {"dp_size": dp, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": None},
        [len(s.tokens) for s in samples],
        global_batch_size=dp,
        rollout_indices=[s.rollout_id for s in samples],
    )


def test_a_job_finds_the_recipe_it_was_made_of(here):
    assert rollout.run().recipe == here.recipe
    assert from_yaml(os.path.join(os.environ[job.RUN], "config.yaml")) == here.recipe


def test_slime_runs_every_step_as_planned(here, slime):
    for number in range(here.schedule.num_steps):
        samples = [s for group in rollout.generate(None, number, None) for s in group]
        partitions, micro_batches, counts, rollouts = scheduled(here, number, samples)
        got = [
            [[partition[i] for i in b] for b in batches]
            for partition, batches in zip(partitions, micro_batches, strict=True)
        ]
        sequences = rollout.run().sequences(here.schedule.step(number))
        assert (
            tuple(tuple(tuple(sequences[i] for i in b) for b in rank) for rank in got)
            == here.schedule.step(number).ranks
        )
        assert counts == [len(got[0])] and rollouts == [here.schedule.dp], "one optimizer step"
        assert len({s.rollout_id for s in samples}) == here.schedule.dp, "as slime counts them"
        for place, (sample, sequence) in enumerate(zip(samples, sequences, strict=True)):
            assert sample.index == place
            assert sample.tokens == here.data.tokens(sequence).tolist()


def test_rollout_ids_of_different_steps_differ(here, slime):
    ids = [{s.rollout_id for group in rollout.generate(None, n, None) for s in group} for n in range(3)]
    assert not (ids[0] & ids[1] or ids[1] & ids[2])


def test_the_mask_is_the_data_sets(here):
    for sequence in range(len(here.data.ids)):
        mask = rollout.loss_mask(here.data, sequence)
        whole = np.zeros(here.data.lengths[sequence], dtype=int)
        for start, end in here.data.spans(sequence):
            whole[start:end] = 1
        assert 1 <= len(mask) < here.data.lengths[sequence]
        assert whole.tolist() == [0] * (len(whole) - len(mask)) + mask
        assert sum(mask) == here.data.supervised[sequence]


@pytest.mark.parametrize(("spans", "what"), [([], "no supervised token"), ([(0, 2)], "supervises its first token")])
def test_what_slime_would_train_wrongly_is_refused(spans, what):
    data = SimpleNamespace(spans=lambda s: spans, lengths=[5], ids=["a"], segments=[0])
    with pytest.raises(TrainError, match=what):
        rollout.loss_mask(data, 0)


def test_another_slime_is_refused(slime):
    slime.build_dp_schedule = lambda args, lengths: None
    with pytest.raises(TrainError, match="is not the pinned one"):
        rollout.bind()


def test_a_schedule_for_other_sequences_is_refused(here, slime):
    samples = [s for group in rollout.generate(None, 0, None) for s in group]
    samples[0].tokens = samples[0].tokens[:-1]
    with pytest.raises(TrainError, match="slime asks for"):
        scheduled(here, 0, samples)


def test_every_rank_verifies_what_it_got(here, slime, monkeypatch):
    samples = [s for group in rollout.generate(None, 0, None) for s in group]
    partitions, micro_batches, _, _ = scheduled(here, 0, samples)
    state = ModuleType("megatron.core.parallel_state")
    core = ModuleType("megatron.core")
    core.parallel_state = state
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    for rank, (partition, batches) in enumerate(zip(partitions, micro_batches, strict=True)):
        state.get_data_parallel_rank = lambda with_context_parallel, rank=rank: rank
        data = {"tokens": [samples[i].tokens for i in partition], "micro_batch_indices": batches}
        rollout.verify(None, 0, data)
        swapped = {**data, "tokens": [[*t[:-1], t[-1] + 1] for t in data["tokens"]]}
        with pytest.raises(TrainError, match="are not those of the data set"):
            rollout.verify(None, 0, swapped)
        with pytest.raises(TrainError, match="not what was planned"):
            rollout.verify(
                None, 0, {**data, "micro_batch_indices": [[0]]} if batches != [[0]] else {**data, "tokens": []}
            )


def test_the_pinned_slime_has_what_is_rebound():
    slime_root = os.environ.get("SLIME_ROOT")
    if not slime_root:
        pytest.skip("SLIME_ROOT is not set")

    tree = ast.parse((Path(slime_root) / "slime/utils/dp_schedule.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "build_dp_schedule")
    assert [a.arg for a in (*function.args.args, *function.args.kwonlyargs)] == rollout.SIGNATURE
    user = (Path(slime_root) / "slime/ray/rollout.py").read_text()
    assert "from slime.utils.dp_schedule import build_dp_schedule" in user
    assert user.count("build_dp_schedule(\n") == 1
