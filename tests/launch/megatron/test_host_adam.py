"""Adam with its state on the host is torch's AdamW bit for bit, whatever the pieces, and its copies wait for one another."""

import pytest
import torch

from launch.megatron import host_adam
from launch.megatron.host_adam import STATES, HostAdam
from launch.model.offload_streams import CopyStreams
from tests.launch.streams import Streams


def groups_of(dtype):
    torch.manual_seed(0)
    shared = {"betas": (0.9, 0.95), "eps": 1e-8}
    sizes = [[20, 42], [128, 10]]  # several pieces and a remainder, whole ones, less than one
    return [
        {"params": [torch.randn(n).to(dtype) for n in some], "lr": lr, "weight_decay": decay, **shared}
        for some, lr, decay in zip(sizes, (1e-2, 3e-3), (0.1, 0.0), strict=True)
    ]


def parameters_of(groups):
    return [p for group in groups for p in group["params"]]


def five_steps(groups, copies):
    """Of `HostAdam` and of torch's on fp32 weights, whose gradients are the same and whose rates of learning change."""
    adam = HostAdam(groups, copies)
    masters = [[p.float().clone() for p in g["params"]] for g in groups]
    reference = torch.optim.AdamW([{**g, "params": m} for g, m in zip(groups, masters, strict=True)], fused=True)
    flat = [m for some in masters for m in some]
    for step in range(5):
        for group, other in zip(groups, reference.param_groups, strict=True):
            group["lr"] = other["lr"] = group["lr"] * 0.7
        for parameter, master in zip(parameters_of(groups), flat, strict=True):
            parameter.decoupled_grad = torch.randn(len(master)) * 10.0 ** (step - 2)
            master.grad = parameter.decoupled_grad.clone()
        adam.step()
        reference.step()
        yield adam, reference, flat


# Pieces of whole vector registers, as the real one is: a register's rest is rounded otherwise.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [16, 48, 1000])
def test_five_steps_are_those_of_torch_bit_for_bit(monkeypatch, dtype, piece):
    monkeypatch.setattr(host_adam, "PIECE", piece)
    groups = groups_of(dtype)
    for number, (adam, reference, masters) in enumerate(five_steps(groups, CopyStreams(torch.device("cpu")))):
        for parameter, master in zip(parameters_of(groups), masters, strict=True):
            theirs, mine = {**reference.state[master], "param": master}, adam.state[parameter]
            assert mine["step"] == int(theirs["step"]) == number + 1
            assert torch.equal(parameter, master.to(dtype))
            for name in STATES:
                assert torch.equal(mine[name], theirs[name]) and mine[name].dtype == torch.float32, name


def test_pieces_come_and_leave_beside_the_update(monkeypatch):
    monkeypatch.setattr(host_adam, "PIECE", 16)
    beside = []
    update = host_adam._update

    def watched(*arguments):
        beside.append((streams.under_way("back"), streams.under_way("out")))
        update(*arguments)

    monkeypatch.setattr(host_adam, "_update", watched)
    with Streams().at_work(monkeypatch) as streams:
        groups = groups_of(torch.bfloat16)
        for adam, *_ in five_steps(groups, streams.copy_streams()):
            assert streams.under_way("out") == 0
            assert not streams.host_waited, "a step does not wait on the host"
            adam.finish()
            assert streams.host_waited, "a checkpoint reads the state"
    assert not streams.freed_early
    pieces = 2 + 3 + 8 + 1
    assert len(beside) == 5 * pieces
    assert len(streams.copies) == 5 * pieces * 2 * len(STATES), "every state once each way"
    # Three states a piece, of which the next one comes and the one before leaves.
    assert beside[:pieces] == [(3, 0), *[(3, 3)] * (pieces - 2), (0, 3)]
