"""A transformer layer that saves only its input and is recomputed in the backward pass. It may also save attention's result, and it
may offload what it saves to host memory.

Megatron's own recomputation (`tensor_parallel.checkpoint`) keeps the input on the GPU and repeats attention. Random-number states
are not restored, because the model has no dropout.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from launch.model.attention_reuse import CachedCall
from launch.model.offload_streams import CopyStreams, PendingCopy


class RecomputedLayer(TransformerLayer):
    """Megatron's layer, recomputed in the backward pass.

    reuse_attention: attention's kernel runs only once, and its result is saved. host_store: where saved tensors are offloaded; None
    leaves them on the GPU.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        reuse_attention: bool,
        host_store: "HostStore | None",
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.reuse_attention, self.host_store = reuse_attention, host_store

    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        """Map hidden_states [t, 1, hidden] to the same shape. The second result is None, as in Megatron's layer without cross
        attention."""
        if not (self.training and torch.is_grad_enabled()):
            out: tuple[Tensor, None] = super().forward(hidden_states, **others)
            return out
        return _Recomputed.apply(hidden_states, self, others), None

    def run(self, hidden_states: Tensor, cached: CachedCall | None, others: dict[str, Any]) -> Tensor:
        """Run Megatron's forward pass, either the first time or as the recomputation."""
        attention = self.self_attention.core_attention
        attention.cached = cached
        try:
            out: Tensor = super().forward(hidden_states, **others)[0]
        finally:
            attention.cached = None
        return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: RecomputedLayer, others: dict[str, Any]) -> Tensor:
        ctx.layer, ctx.others, ctx.offloaded = layer, others, None
        ctx.cached = CachedCall() if layer.reuse_attention else None
        with torch.no_grad():
            out = layer.run(hidden, ctx.cached, others)
        saved = [hidden, *(ctx.cached.tensors if ctx.cached else ())]
        if ctx.cached:
            ctx.cached.tensors = []
        if layer.host_store:
            ctx.offloaded = layer.host_store.save(saved)
        else:
            ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        hidden, *tensors = ctx.layer.host_store.restore(ctx.offloaded) if ctx.offloaded else ctx.saved_tensors
        if ctx.cached:
            ctx.cached.tensors = tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():  # the next layer has already used the result: only its gradient edge is needed
            edge = get_gradient_edge(ctx.layer.run(hidden, ctx.cached, ctx.others))
        torch.autograd.backward(edge, gradient)
        return hidden.grad, None, None


class OffloadedTensors:
    """The saved tensors of one layer, in host memory.

    previous: the layer saved before this one in the same forward pass, whose tensors the backward pass needs next.
    """

    def __init__(self, hosts: list[Tensor], previous: "OffloadedTensors | None") -> None:
        self.hosts, self.previous = hosts, previous
        self.pending: PendingCopy | None = None


class HostStore:
    """Host memory for what the layers of a rank save. The backward pass of a layer prefetches the tensors of the previous layer."""

    def __init__(self, copies: CopyStreams) -> None:
        self._copies = copies
        self._last: OffloadedTensors | None = None

    def save(self, tensors: list[Tensor]) -> OffloadedTensors:
        """Start to copy the tensors of one layer to the host."""
        hosts = [self._copies.empty_like(tensor) for tensor in tensors]
        self._copies.copy_to_host(tensors, hosts)
        self._last = OffloadedTensors(hosts, self._last)
        return self._last

    def restore(self, offloaded: OffloadedTensors) -> list[Tensor]:
        """Return the tensors of one layer on the device, free their host memory, and prefetch the previous layer."""
        self._copies.wait_for_host_copies()
        pending = offloaded.pending or self._copies.copy_to_device(offloaded.hosts)
        tensors = self._copies.wait(pending)
        previous = offloaded.previous
        if previous and previous.hosts and not previous.pending:
            previous.pending = self._copies.copy_to_device(previous.hosts)
        offloaded.hosts, offloaded.pending, offloaded.previous = [], None, None
        return tensors
