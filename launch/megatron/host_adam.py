"""Adam with its fp32 weights and moments in host memory between steps. It updates them on the GPU, piece by piece.

Megatron's `HybridDeviceOptimizer` updates on the host instead. That moves 28 bytes of host memory per parameter; this optimizer
moves 12 bytes per parameter over PCIe in each direction, both at the same time. Megatron's also does not run without a GPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from launch.model.offload_streams import CopyStreams, PendingCopy

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 weights and moments
PIECE = 2**26  # elements per update; three pieces are on the GPU at once


class HostAdam:
    """The interface that Megatron uses of an optimizer.

    groups: Megatron's groups of flat parameters; their fp32 gradients are in `decoupled_grad`. state: for each parameter, the
    `STATES` in host memory, and `step`, the number of updates.
    """

    def __init__(self, groups: list[dict[str, Any]], copies: CopyStreams) -> None:
        self.param_groups, self._copies = groups, copies
        self.state: dict[Tensor, dict[str, Any]] = {}
        for parameter in self._parameters():
            states = {name: copies.empty_like(parameter.detach().float()) for name in STATES}
            states["param"].copy_(parameter.detach())
            states["exp_avg"].zero_()
            states["exp_avg_sq"].zero_()
            self.state[parameter] = {"step": 0, **states}

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter once. While one piece is updated, the next is copied in and the previous is copied out."""
        pieces = [
            (group, parameter, slice(start, start + PIECE))
            for group in self.param_groups
            for parameter in group["params"]
            for start in range(0, parameter.numel(), PIECE)
        ]
        pending: PendingCopy | None = None
        for number, (group, parameter, piece) in enumerate(pieces):
            tensors = self._copies.wait(pending or self._start_copy_in(parameter, piece))
            if number + 1 < len(pieces):
                pending = self._start_copy_in(*pieces[number + 1][1:])
            _update(group, self.state[parameter]["step"], tensors, parameter.decoupled_grad[piece])
            parameter[piece].copy_(tensors[0])
            self._copies.copy_to_host(tensors, self._hosts(parameter, piece))
        self._copies.wait_for_host_copies()
        for parameter in self._parameters():
            self.state[parameter]["step"] += 1

    def finish(self) -> None:
        """Block until the state is complete in host memory, so that a checkpoint can read it."""
        self._copies.synchronize()

    def _hosts(self, parameter: Tensor, piece: slice) -> list[Tensor]:
        return [self.state[parameter][name][piece] for name in STATES]

    def _start_copy_in(self, parameter: Tensor, piece: slice) -> PendingCopy:
        return self._copies.copy_to_device(self._hosts(parameter, piece))


def _update(group: dict[str, Any], step: int, tensors: list[Tensor], gradient: Tensor) -> None:
    weight, exp_avg, exp_avg_sq = tensors
    beta1, beta2 = group["betas"]
    steps = torch.full((), float(step), device=weight.device)  # `torch.tensor` would wait for the GPU
    adamw(
        [weight], [gradient], [exp_avg], [exp_avg_sq], [], [steps], fused=True,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip


def parts_of(optimizer: Any) -> list[Any]:
    """Return Megatron's distributed optimizers. Experts have their own if their data-parallel ranks differ from attention's."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]
