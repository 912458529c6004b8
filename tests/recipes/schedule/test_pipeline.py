"""The simulation against one that follows every pass and what it waits for, written apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schedule.pipeline import Pipeline, in_flight


def by_events(forward, stages, backward):
    """Runs each stage's list of passes, each as soon as the stage is free and what it needs has ended."""
    count = len(forward)
    lists = []
    for s in range(stages):
        warm = min(stages - 1 - s, count)
        passes = [("F", i) for i in range(warm)]
        for i in range(count - warm):
            passes += [("F", warm + i), ("B", i)]
        lists.append(passes + [("B", i) for i in range(count - warm, count)])
    ended, at, clock = {}, [0] * stages, [0.0] * stages
    while any(at[s] < len(lists[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(lists[s]):
                kind, i = lists[s][at[s]]
                forward_needs = ("F", i, s - 1) if s else None
                backward_needs = ("B", i, s + 1) if s < stages - 1 else ("F", i, s)
                needs = forward_needs if kind == "F" else backward_needs
                if needs and needs not in ended:
                    break
                clock[s] = max(clock[s], ended.get(needs, 0.0)) + forward[i] * (1 if kind == "F" else backward)
                ended[kind, i, s] = clock[s]
                at[s] += 1
    return max(clock)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.integers(1, 8), st.sampled_from([2.0, 3.0])
)  # fmt: skip
def test_it_is_what_following_every_pass_gives(forward, stages, backward):
    found = Pipeline(stages, backward).makespan(np.array([forward, forward[::-1]]))
    assert found[0] == pytest.approx(by_events(forward, stages, backward))
    assert found[1] == pytest.approx(by_events(forward[::-1], stages, backward))


def test_equal_micro_batches_have_the_bubble_of_the_paper():
    """m micro-batches on p stages take (m + p - 1) times a forward and a backward pass."""
    assert Pipeline(4, 2.0).makespan(np.ones((1, 16)))[0] == (16 + 3) * 3


def test_fewer_micro_batches_are_zeros_at_the_end():
    two = Pipeline(3, 2.0).makespan(np.array([[2.0, 1.0, 0.0, 0.0], [2.0, 1.0, 3.0, 1.0]]))
    assert two[0] == Pipeline(3, 2.0).makespan(np.array([[2.0, 1.0]]))[0] < two[1]


def interleaved(forward, stages, chunks, backward):
    """As `by_events`, chunks in Megatron's order: groups of `stages` micro-batches pass one chunk after the other."""
    count = len(forward)
    table = [(c, i) for g in range(0, count, stages) for c in range(chunks) for i in range(g, g + stages)]
    lists = []
    for s in range(stages):
        warm = min((stages - s - 1) * 2 + (chunks - 1) * stages, len(table))
        passes = [("F", *table[k]) for k in range(warm)]
        for k in range(len(table)):
            if warm + k < len(table):
                passes.append(("F", *table[warm + k]))
            c, i = table[k]
            passes.append(("B", chunks - 1 - c, i))
        lists.append(passes)
    ended, at, clock = {}, [0] * stages, [0.0] * stages
    while any(at[s] < len(lists[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(lists[s]):
                kind, c, i = lists[s][at[s]]
                if kind == "F":
                    needs = ("F", c, i, s - 1) if s else ("F", c - 1, i, stages - 1) if c else None
                elif s < stages - 1:
                    needs = ("B", c, i, s + 1)
                else:
                    needs = ("B", c + 1, i, 0) if c < chunks - 1 else ("F", c, i, s)
                if needs and needs not in ended:
                    break
                takes = forward[i] / chunks * (1 if kind == "F" else backward)
                clock[s] = ended[kind, c, i, s] = max(clock[s], ended.get(needs, 0.0)) + takes
                at[s] += 1
    return max(clock)


@given(st.integers(2, 4), st.integers(2, 3), st.integers(1, 3), st.data())
def test_an_interleaved_pipeline_is_what_following_every_pass_gives(stages, chunks, groups, data):
    count = stages * groups
    forward = data.draw(st.lists(st.floats(0.01, 10), min_size=count, max_size=count))
    found = Pipeline(stages, 2.0, chunks).makespan(np.array([forward]))[0]
    assert found == pytest.approx(interleaved(forward, stages, chunks, 2.0))


def test_interleaving_divides_the_bubble():
    """(p - 1) / v of a forward and a backward pass (arXiv 2104.04473, section 2.2)."""
    assert Pipeline(4, 2.0, 2).makespan(np.ones((1, 16)))[0] == pytest.approx((16 + 3 / 2) * 3)


def test_stages_may_take_unlike_times():
    unlike = np.array([[[1.0] * 8], [[3.0] * 8]])
    assert Pipeline(2).makespan(unlike)[0] == pytest.approx(8 * 9 + 1 + 2), "the slow one never waits but at its ends"


def test_passes_are_told_with_their_times():
    told = Pipeline(2).passes(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    assert len(told) == 8
    assert max(end for *_, end in told) == Pipeline(2).makespan(np.array([[1.0, 2.0]]))[0]
    assert all(end - start == (1 + p.micro_batch) * (1 if p.forward else 2) for p, start, end in told)


def test_an_early_stage_holds_a_batch_for_each_stage_behind_it():
    assert [in_flight(4, 16, 1, s) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, 2, 1, s) for s in range(4)] == [2, 2, 2, 1]
    assert in_flight(2, 4, 2, 0) == 2 + 2 + 1, "chunks: two a later stage, one group of the other chunk, and its own"
