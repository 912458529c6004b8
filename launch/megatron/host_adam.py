"""Adam whose fp32 weights and moments stay in the host's memory between steps, and are updated on the GPU piece by piece.

Megatron's `HybridDeviceOptimizer` updates on the host instead: 28 bytes of its memory's bandwidth a parameter, where this moves 12
each way over PCIe at once; and it does not run without a GPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from launch.model.offload_streams import Coming, Lane

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 weights and moments
PIECE = 2**26  # elements that are updated at a time; three pieces are on the GPU


class HostAdam:
    """What Megatron uses of an optimizer. Takes its groups of flat parameters, whose fp32 gradients are in `decoupled_grad`.

    state: of each parameter the `STATES` in the host's memory and `step`, the number of updates.
    """

    def __init__(self, groups: list[dict[str, Any]], lane: Lane) -> None:
        self.param_groups, self._lane = groups, lane
        self.state: dict[Tensor, dict[str, Any]] = {}
        for parameter in self._parameters():
            states = {name: lane.empty_like(parameter.detach().float()) for name in STATES}
            states["param"].copy_(parameter.detach())
            states["exp_avg"].zero_()
            states["exp_avg_sq"].zero_()
            self.state[parameter] = {"step": 0, **states}

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter, of which the next piece comes while one is updated and the one before it leaves."""
        pieces = [
            (group, parameter, slice(start, start + PIECE))
            for group in self.param_groups
            for parameter in group["params"]
            for start in range(0, parameter.numel(), PIECE)
        ]
        coming: Coming | None = None
        for number, (group, parameter, piece) in enumerate(pieces):
            tensors = self._lane.wait(coming or self._come(parameter, piece))
            if number + 1 < len(pieces):
                coming = self._come(*pieces[number + 1][1:])
            _update(group, self.state[parameter]["step"], tensors, parameter.decoupled_grad[piece])
            parameter[piece].copy_(tensors[0])
            self._lane.leave(tensors, self._hosts(parameter, piece))
        self._lane.arrive()
        for parameter in self._parameters():
            self.state[parameter]["step"] += 1

    def finish(self) -> None:
        """Waits until the state is in the host's memory, where a checkpoint reads it."""
        self._lane.finish()

    def _hosts(self, parameter: Tensor, piece: slice) -> list[Tensor]:
        return [self.state[parameter][name][piece] for name in STATES]

    def _come(self, parameter: Tensor, piece: slice) -> Coming:
        return self._lane.come(self._hosts(parameter, piece))


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
    """Megatron's distributed optimizers: that of the experts apart, where their ranks are not those of the attention."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]
