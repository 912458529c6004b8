"""The planned steps inside slime, against the schedule; what is rebound, against slime's source where it is there."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from launch.run.run_plan import Plan
from launch.slime import job
from launch.slime.hooks import rollout
from recipes.compose.recipe import from_yaml, to_yaml
from recipes.errors import TrainError
from tests.launch.support import recipe_of


@pytest.fixture(params=["", "layout.pp=2 layout.vpp=2 model.layers=4", "layout.cp=2 layout.max_tokens_per_gpu=1024"])
def here(request, root, tmp_path, monkeypatch):
    """A run folder of a small recipe on two or four data-parallel ranks, as a job finds it."""
    recipe, data, heldout = recipe_of(root, "cluster.gpus_per_node=4", "optim.epochs=4", *request.param.split())
    plan = Plan(recipe, data, heldout)
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    (tmp_path / "plan.json").write_text(
        json.dumps({"data": {"folder": str(data.folder)}, "heldout": None, "rehearsal": False})
    )
    monkeypatch.setenv(job.RUN, str(tmp_path))
    rollout.run_plan.cache_clear()
    yield plan
    rollout.run_plan.cache_clear()


@pytest.fixture
def manager(monkeypatch):
    """Of `manager.py`, made anew: what is bound in it lasts for a test."""

    class Sample(SimpleNamespace):
        Status = SimpleNamespace(COMPLETED="completed")

    for name in ("slime", "slime.utils", "slime.utils.types"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["slime.utils.types"].Sample = Sample
    spec = importlib.util.spec_from_file_location("slime_manager", Path(__file__).with_name("manager.py"))
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.Manager()


def test_a_job_finds_the_recipe_it_was_made_of(here):
    assert rollout.run_plan().recipe == here.recipe
    assert from_yaml(Path(os.environ[job.RUN], "config.yaml")) == here.recipe


def test_slime_runs_every_step_as_planned(here, manager):
    dp = here.schedule.dp
    for number in range(here.schedule.num_steps):
        samples = manager.generate(number)
        partitions, micro_batches, counts, rollouts = manager._split_train_data_by_dp(dp, samples)
        ranks = zip(partitions, micro_batches, strict=True)
        got = [[[partition[i] for i in b] for b in batches] for partition, batches in ranks]
        sequences = rollout.in_order(here.schedule.step(number))
        by_sequence = tuple(tuple(tuple(sequences[i] for i in b) for b in rank) for rank in got)
        assert by_sequence == here.schedule.step(number).ranks
        assert counts == [len(got[0])] and rollouts == [dp], "one optimizer step"
        assert len({s.rollout_id for s in samples}) == dp, "as slime counts them"
        for place, (sample, sequence) in enumerate(zip(samples, sequences, strict=True)):
            assert sample.index == place
            assert sample.tokens == here.data.tokens(sequence).tolist()


def test_rollout_ids_of_different_steps_differ(here, manager):
    ids = [{s.rollout_id for s in manager.generate(n)} for n in range(3)]
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


def test_another_slime_is_refused(here, manager):
    names = type(manager).generate.__globals__
    for other in (lambda args, lengths: None, None):
        names["build_dp_schedule"] = other
        with pytest.raises(TrainError, match="is none of launch/cluster/image/pins.py"):
            manager.generate(0)
    with pytest.raises(TrainError, match="is none of launch/cluster/image/pins.py"):
        rollout.generate(None, 0, None)


def test_a_schedule_for_other_sequences_is_refused(here, manager):
    samples = manager.generate(0)
    samples[0].tokens = samples[0].tokens[:-1]
    with pytest.raises(TrainError, match="slime asks for"):
        manager._split_train_data_by_dp(here.schedule.dp, samples)


def test_every_rank_verifies_what_it_got(here, manager, monkeypatch):
    samples = manager.generate(0)
    partitions, micro_batches, _, _ = manager._split_train_data_by_dp(here.schedule.dp, samples)
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
