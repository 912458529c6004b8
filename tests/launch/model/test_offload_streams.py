"""Copies between a GPU and the host are complete before anyone uses them, and leave the GPU's memory early. The GPU's streams are
stand-ins that check the order (`streams.py`)."""

import pytest
import torch

from launch.model.offload_streams import BESIDE, Lane
from tests.launch.streams import Streams


@pytest.fixture
def streams(monkeypatch):
    with Streams().at_work(monkeypatch) as streams:
        yield streams
    assert not streams.freed_early


def test_on_a_cpu_copies_are_copies():
    lane = Lane(torch.device("cpu"))
    tensors = [torch.rand(3, 4).t(), torch.arange(5)]
    wanted = [t.clone() for t in tensors]
    hosts = [lane.empty_like(t) for t in tensors]
    lane.leave(tensors, hosts)
    for t in tensors:
        t.zero_()
    back = lane.wait(lane.come(hosts))
    lane.arrive()
    for host in hosts:
        host.zero_()
    for mine, other in zip(back, wanted, strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride()


def test_what_leaves_is_computed_first_and_stays_until_it_has_left(streams):
    lane = streams.lane()
    x, wanted, hosts = torch.zeros(4), [], []
    for layer in range(4):
        x = x + 1
        wanted.append(layer + 1)
        hosts.append(lane.empty_like(x))
        lane.leave([x], [hosts[-1]])
        assert streams.under_way("out") == min(layer + 1, BESIDE), "copied beside the next layer, and no more"
    del x
    lane.arrive()
    assert streams.under_way("out") == 0
    assert [h.tolist() for h in hosts] == [[n] * 4 for n in wanted]


def test_what_comes_is_waited_for_where_it_is_used(streams):
    lane = streams.lane()
    hosts = [lane.empty_like(torch.empty(4)).fill_(n) for n in range(2)]
    (x,) = lane.wait(lane.come(hosts[:1]))
    assert streams.under_way("back") == 0
    second = lane.come(hosts[1:])
    x = x + x
    assert streams.under_way("back") == 1, "comes beside the computation"
    (y,) = lane.wait(second)
    assert torch.equal(x + y, torch.ones(4))


def test_the_stand_ins_see_what_goes_wrong(streams):
    """What every other test with them leans on."""
    lane = streams.lane()
    host = lane.empty_like(torch.empty(4)).zero_()
    coming = lane.come([host])
    with pytest.raises(AssertionError, match="computation does not wait for"):
        coming.tensors[0] + 1
    computed = torch.ones(4) + 1
    with streams.on(streams.out), pytest.raises(AssertionError, match="out does not wait for"):
        host.copy_(computed)
    del coming
    assert streams.freed_early
    streams.freed_early.clear()
