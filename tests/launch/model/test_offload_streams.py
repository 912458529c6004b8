"""Copies between a GPU and the host are complete before anyone uses them, and leave the GPU's memory early. The GPU's streams are
stand-ins that check the order (`streams.py`)."""

import pytest
import torch

from launch.model.offload_streams import MAX_OVERLAPPING_COPIES, CopyStreams
from tests.launch.streams import Streams


@pytest.fixture
def streams(monkeypatch):
    with Streams().at_work(monkeypatch) as streams:
        yield streams
    assert not streams.freed_early


def test_on_a_cpu_copies_are_copies():
    copies = CopyStreams(torch.device("cpu"))
    tensors = [torch.rand(3, 4).t(), torch.arange(5)]
    wanted = [t.clone() for t in tensors]
    hosts = [copies.empty_like(t) for t in tensors]
    copies.copy_to_host(tensors, hosts)
    for t in tensors:
        t.zero_()
    back = copies.wait(copies.copy_to_device(hosts))
    copies.wait_for_host_copies()
    for host in hosts:
        host.zero_()
    for mine, other in zip(back, wanted, strict=True):
        assert torch.equal(mine, other) and mine.stride() == other.stride()


def test_what_leaves_is_computed_first_and_stays_until_it_has_left(streams):
    copies = streams.copy_streams()
    x, wanted, hosts = torch.zeros(4), [], []
    for layer in range(4):
        x = x + 1
        wanted.append(layer + 1)
        hosts.append(copies.empty_like(x))
        copies.copy_to_host([x], [hosts[-1]])
        assert streams.under_way("out") == min(layer + 1, MAX_OVERLAPPING_COPIES), (
            "copied beside the next layer, and no more"
        )
    del x
    copies.wait_for_host_copies()
    assert streams.under_way("out") == 0
    assert [h.tolist() for h in hosts] == [[n] * 4 for n in wanted]


def test_what_comes_is_waited_for_where_it_is_used(streams):
    copies = streams.copy_streams()
    hosts = [copies.empty_like(torch.empty(4)).fill_(n) for n in range(2)]
    (x,) = copies.wait(copies.copy_to_device(hosts[:1]))
    assert streams.under_way("back") == 0
    second = copies.copy_to_device(hosts[1:])
    x = x + x
    assert streams.under_way("back") == 1, "comes beside the computation"
    (y,) = copies.wait(second)
    assert torch.equal(x + y, torch.ones(4))


def test_the_stand_ins_see_what_goes_wrong(streams):
    """What every other test with them leans on."""
    copies = streams.copy_streams()
    host = copies.empty_like(torch.empty(4)).zero_()
    pending = copies.copy_to_device([host])
    with pytest.raises(AssertionError, match="computation does not wait for"):
        pending.tensors[0] + 1
    computed = torch.ones(4) + 1
    with streams.on(streams.out), pytest.raises(AssertionError, match="out does not wait for"):
        host.copy_(computed)
    del pending
    assert streams.freed_early
    streams.freed_early.clear()
