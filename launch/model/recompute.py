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
from recipes.plan.memory import PINNED_PIECE


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
    """The saved tensors of one layer, in pieces in host memory.

    previous: the layer saved before this one in the same forward pass, whose tensors the backward pass needs next.
    """

    def __init__(self, tensors: list[Tensor], hosts: list[Tensor], previous: "OffloadedTensors | None") -> None:
        self._layouts = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in tensors]
        self.hosts, self.previous = hosts, previous
        self.tensors: list[Tensor] = []  # on the device again, as soon as `pending` is set
        self.pending: PendingCopy | None = None

    def fetch(self, copies: CopyStreams) -> None:
        """Start to copy the tensors back to the device."""
        self.tensors = [
            torch.empty_strided(size, stride, dtype=dtype, device=copies.device)
            for size, stride, dtype in self._layouts
        ]
        self.pending = copies.copy_to_device(self.hosts, pieces_of(self.tensors))


class HostStore:
    """Host memory for what the layers of a rank save. The backward pass of a layer prefetches the tensors of the previous layer."""

    def __init__(self, copies: CopyStreams) -> None:
        self._copies = copies
        self._last: OffloadedTensors | None = None

    def save(self, tensors: list[Tensor]) -> OffloadedTensors:
        """Start to copy the tensors of one layer to the host."""
        pieces = pieces_of(tensors)
        hosts = [self._copies.empty_like(piece) for piece in pieces]
        self._copies.copy_to_host(pieces, hosts)
        self._last = OffloadedTensors(tensors, hosts, self._last)
        return self._last

    def restore(self, offloaded: OffloadedTensors) -> list[Tensor]:
        """Return the tensors of one layer on the device, free their host memory, and prefetch the previous layer."""
        self._copies.wait_for_host_copies()
        if offloaded.pending is None:
            offloaded.fetch(self._copies)
        assert offloaded.pending is not None
        self._copies.wait(offloaded.pending)
        previous = offloaded.previous
        if previous and previous.hosts and not previous.pending:
            previous.fetch(self._copies)
        tensors = offloaded.tensors
        offloaded.hosts, offloaded.tensors, offloaded.pending, offloaded.previous = [], [], None, None
        return tensors


def pieces_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return dense tensors as flat views of at most `PINNED_PIECE` bytes each, in the order of their memory."""
    found = []
    for t in tensors:
        spanned = 1 + sum((size - 1) * stride for size, stride in zip(t.size(), t.stride(), strict=True))
        assert spanned == t.numel(), "not dense"
        found += t.as_strided((t.numel(),), (1,)).split(PINNED_PIECE // t.element_size())
    return found
