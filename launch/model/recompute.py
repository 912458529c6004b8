"""A transformer layer that keeps its input alone and is computed again in the backward pass; attention's result may be kept with
it, and both may wait in the host's memory.

Megatron's own recomputation (`tensor_parallel.checkpoint`) keeps the input on the GPU and repeats attention. Random numbers are not
restored: there is no dropout.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from launch.model.attention_reuse import Kept
from launch.model.offload_streams import Coming, Lane


class RecomputedLayer(TransformerLayer):
    """keep_attention: its kernel runs once. stays: where what is kept waits; on the GPU where None."""

    def __init__(
        self, config: TransformerConfig, *args: Any, keep_attention: bool, stays: "Stays | None", **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.keep_attention, self.stays = keep_attention, stays

    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        """hidden_states [t, 1, hidden] -> the same, and None, as Megatron's layer without cross attention."""
        if not (self.training and torch.is_grad_enabled()):
            out: tuple[Tensor, None] = super().forward(hidden_states, **others)
            return out
        return _Recomputed.apply(hidden_states, self, others), None

    def run(self, hidden_states: Tensor, kept: Kept | None, others: dict[str, Any]) -> Tensor:
        """One of the two passes."""
        attention = self.self_attention.core_attention
        attention.kept = kept
        try:
            out: Tensor = super().forward(hidden_states, **others)[0]
        finally:
            attention.kept = None
        return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: RecomputedLayer, others: dict[str, Any]) -> Tensor:
        ctx.layer, ctx.others, ctx.stay = layer, others, None
        ctx.kept = Kept() if layer.keep_attention else None
        with torch.no_grad():
            out = layer.run(hidden, ctx.kept, others)
        waiting = [hidden, *(ctx.kept.tensors if ctx.kept else ())]
        if ctx.kept:
            ctx.kept.tensors = []
        if layer.stays:
            ctx.stay = layer.stays.put(waiting)
        else:
            ctx.save_for_backward(*waiting)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        hidden, *tensors = ctx.layer.stays.take(ctx.stay) if ctx.stay else ctx.saved_tensors
        if ctx.kept:
            ctx.kept.tensors = tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():  # of the result, which the next layer has used, only its place in the graph is wanted
            end = get_gradient_edge(ctx.layer.run(hidden, ctx.kept, ctx.others))
        torch.autograd.backward(end, gradient)
        return hidden.grad, None, None


class Stay:
    """Tensors in the host's memory; before: those that left before them in the same forward pass, and are wanted after them."""

    def __init__(self, hosts: list[Tensor], before: "Stay | None") -> None:
        self.hosts, self.before = hosts, before
        self.coming: Coming | None = None


class Stays:
    """What the layers of a rank keep, in the host's memory. A layer's backward pass starts the way back of the layer before it."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._last: Stay | None = None

    def put(self, tensors: list[Tensor]) -> Stay:
        hosts = [self._lane.empty_like(tensor) for tensor in tensors]
        self._lane.leave(tensors, hosts)
        self._last = Stay(hosts, self._last)
        return self._last

    def take(self, stay: Stay) -> list[Tensor]:
        self._lane.arrive()
        coming = stay.coming or self._lane.come(stay.hosts)
        tensors = self._lane.wait(coming)
        if stay.before and stay.before.hosts and not stay.before.coming:
            stay.before.coming = self._lane.come(stay.before.hosts)
        stay.hosts, stay.coming, stay.before = [], None, None
        return tensors
