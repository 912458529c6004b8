"""Contract 3, line by line, over random data sets and layouts."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.config import Sampling
from recipes.errors import ConfigError
from recipes.schedule.pipeline import Pipeline
from recipes.schedule.schedule import Rehearsal, Schedule
from recipes.schedule.slime_packing import first_fit


def schedule(lengths, trajectory=None, **changes):
    options = (
        dict(costs=[n * (8192 + n) for n in lengths], batch_size=4, epochs=2, seed=0, dp=1, max_tokens=10_000) | changes
    )
    return Schedule(trajectory=trajectory or list(range(len(lengths))), lengths=lengths, **options)


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(78, 64, [78]), (78, 32, [39, 39]), (20, 5, [5, 5, 5, 5]), (7, 3, [4, 3]), (3, 8, [3])],
)
def test_an_epoch_is_cut_into_steps_of_sizes_that_differ_by_at_most_one(n, batch_size, sizes):
    s = schedule([10] * n, batch_size=batch_size, epochs=1)
    assert [len(s.step(i).trajectories) for i in range(s.num_steps)] == sizes


@st.composite
def schedules(draw):
    segments = draw(st.lists(st.integers(1, 3), min_size=1, max_size=40))
    trajectory = [t for t, count in enumerate(segments) for _ in range(count)]
    lengths = draw(st.lists(st.integers(1, 400), min_size=len(trajectory), max_size=len(trajectory)))
    return schedule(
        lengths,
        trajectory,
        batch_size=draw(st.integers(1, 50)),
        epochs=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 5)),
        dp=draw(st.integers(1, 4)),
        max_tokens=draw(st.integers(480, 2000)),
        sequence_multiple=draw(st.sampled_from([1, 4])),
        batch_multiple=draw(st.sampled_from([4, 8])),
        micro_batch_multiple=draw(st.integers(1, 2)),
        pipeline=Pipeline(draw(st.sampled_from([1, 1, 2, 4])), draw(st.sampled_from([2.0, 3.0]))),
    )


@settings(deadline=None)
@given(schedules())
def test_every_step_keeps_the_contract(s):
    seen = Counter()
    sizes = Counter()
    for number in range(s.num_steps):
        try:
            step = s.step(number)
        except ConfigError as error:
            assert "cannot fill" in error.problem
            continue
        seen.update((step.epoch, t) for t in step.trajectories)
        sizes[len(step.trajectories)] += 1
        placed = [q for rank in step.ranks for micro_batch in rank for q in micro_batch]
        wanted = [q for q, t in enumerate(s.trajectory) if t in step.trajectories]
        assert sorted(placed) == wanted, "all segments of the step's trajectories, each once"
        assert len({len(rank) for rank in step.ranks}) == 1, "equally many micro-batches on every rank"
        assert len(step.ranks) == s.dp
        assert len(step.ranks[0]) % s.micro_batch_multiple == 0
        for rank in step.ranks:
            for micro_batch in rank:
                assert micro_batch, "no empty micro-batch"
                assert s.padded([s.lengths[q] for q in micro_batch]) <= s.max_tokens
        assert s.step(number) == step, "a pure function"
    assert all(count == 1 for count in seen.values()), "each trajectory once an epoch"
    assert not sizes or max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(schedules(), schedules())
def test_lengths_and_layout_do_not_choose_the_trajectories(a, b):
    """Two schedules of as many trajectories with the same batch size and seed train on the same steps."""
    n = min(len(set(a.trajectory)), len(set(b.trajectory)))
    first = schedule([7] * n, batch_size=3, seed=1)
    second = schedule(
        list(range(1, n + 1)), batch_size=3, seed=1, max_tokens=400, sequence_multiple=4, batch_multiple=8
    )
    for number in range(first.num_steps):
        assert first.step(number).trajectories == second.step(number).trajectories


def test_seeds_and_epochs_shuffle_differently():
    s = schedule([10] * 50, batch_size=50, epochs=2)
    other = schedule([10] * 50, batch_size=50, seed=1)
    assert len({s.step(0).trajectories, s.step(1).trajectories, other.step(0).trajectories}) == 3


def test_the_order_of_a_seed_never_changes():
    """Runs are resumed by newer versions of this project: the shuffle is part of the contract."""
    assert schedule([10] * 8, batch_size=8).step(0).trajectories == (6, 1, 2, 7, 0, 3, 5, 4)


def test_a_sequence_over_the_cap_and_a_step_too_small_for_the_ranks_are_refused():
    with pytest.raises(ConfigError, match="layout.max_tokens_per_gpu"):
        schedule([10, 20_000])
    with pytest.raises(ConfigError, match="cannot fill"):
        schedule([10, 10], dp=4).step(0)
    with pytest.raises(ConfigError, match="no sequence"):
        schedule([])


def test_copies_come_so_often_an_epoch():
    s = schedule([10] * 7, copies=2, batch_size=7, epochs=1)
    assert Counter(t for n in range(s.num_steps) for t in s.step(n).trajectories) == dict.fromkeys(range(7), 2)


def stream(n, batch_size, epochs, **changes):
    options = dict(copies=2, sampling=Sampling.stream, batch_size=batch_size, epochs=epochs) | changes
    return schedule([10] * n, **options)


def test_a_stream_cuts_batches_of_one_size_and_ends_before_its_last_epoch_does():
    """slime's data source on LIMI's 78 trajectories twice: 8 steps of 64, 3.28 of 4 epochs."""
    s = stream(78, 64, 4)
    steps = [s.step(n).trajectories for n in range(s.num_steps)]
    assert [len(step) for step in steps] == [64] * 8
    rows = [t for step in steps for t in step]
    for epoch in range(3):
        assert Counter(rows[156 * epoch : 156 * (epoch + 1)]) == dict.fromkeys(range(78), 2)


def test_a_stream_packs_as_slime_does():
    s = schedule([400, 90, 300, 110, 600], sampling=Sampling.stream, batch_size=5, epochs=1, max_tokens=500)
    (rank,) = s.step(0).ranks
    order = s.step(0).trajectories
    batches = first_fit([s.lengths[t] for t in order], 500)
    assert rank == tuple(tuple(order[i] for i in b) for b in batches)
    assert any(s.padded([s.lengths[i] for i in b]) > 500 for b in rank), "the longest runs alone above the cap"


def test_a_stream_that_would_train_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"no batch of 200 from 156 rows .*optim\.batch_size=156"):
        stream(78, 200, 4)


def test_all_steps_are_checked_without_the_search():
    schedule([10] * 8, batch_size=4, dp=2).check()
    with pytest.raises(ConfigError, match="cannot fill"):
        schedule([10] * 7, batch_size=1, dp=2).check()


def _fields(s):
    return {name: getattr(s, name) for name, field in Schedule.__dataclass_fields__.items() if field.init}


@settings(deadline=None)
@given(schedules())
def test_a_rehearsal_holds_as_much_as_any_step_and_runs_the_longest_sequence(s):
    rehearsal = Rehearsal(**_fields(s))
    try:
        fullest = max(s.loads(s.step(number))[0].max() for number in range(s.num_steps))
    except ConfigError:
        with pytest.raises(ConfigError):
            rehearsal.step(0)
        return
    assert rehearsal.num_steps == 2
    step = rehearsal.step(0)
    assert step == rehearsal.step(1)
    tokens, _ = s.loads(step)
    in_flight = max(s.pipeline.stages, s.micro_batch_multiple)
    assert (tokens[:, :in_flight] == fullest).all()
    assert tokens.max() == fullest
    assert tokens.shape[1] % s.micro_batch_multiple == 0
    assert max(s.lengths) in {s.lengths[i] for i in step.sequences}
    assert set(step.trajectories) == {s.trajectory[i] for i in step.sequences}
