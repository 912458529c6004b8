"""The simulation against one that follows every pass and what it waits for, written apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.pipeline import Pipeline


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
