"""Chunked cross entropy over a vocabulary sharded by tensor parallelism. The logits of all tokens are never in memory at once. On a
GPU, logits are never in memory in fp32.

The forward pass saves one number per token; the backward pass recomputes each chunk's logits. Cost: one more product of the output
layer. Savings: 4 x vocabulary / tp bytes per token, and as much again in working memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    _gather_along_first_dim,
    _reduce,
    _reduce_scatter_along_first_dim,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from launch.model.compiled import fused


class ChunkedLossGPT(GPTModel):
    """Megatron's model with a last stage that computes the loss `loss_chunk` tokens at a time."""

    loss_chunk: int

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        """Return the loss of each token, [1, t] fp32.

        hidden_states: [t, 1, hidden], or [t / tp, 1, hidden] with sequence parallelism. labels: [1, t].
        """
        if labels is None or not self.post_process:
            out: Tensor = super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
            return out
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        losses: Tensor = _ChunkedCrossEntropy.apply(
            hidden_states[:, 0],
            weight,
            labels[0],
            self.loss_chunk,
            self.pg_collection.tp,
            self.config.sequence_parallel,
        )
        return losses[None]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of each token, chunk by chunk.

    hidden: [t, hidden], or this rank's t / tp rows if `scattered`. weight: [vocabulary / tp, hidden]. labels: [t].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, group: ProcessGroup, scattered: bool
    ) -> Tensor:
        rows = _gather_along_first_dim(hidden, group) if scattered else hidden
        normalisers = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        losses = torch.empty_like(normalisers)
        for part in _parts(len(labels), chunk):
            normalisers[part], losses[part] = _normaliser_and_loss(rows[part], weight, labels[part], group)
        ctx.save_for_backward(hidden, weight, labels, normalisers)
        ctx.chunk, ctx.group, ctx.scattered = chunk, group, scattered
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalisers = ctx.saved_tensors
        rows = _gather_along_first_dim(hidden, ctx.group) if ctx.scattered else hidden
        of_rows = torch.empty_like(rows)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed over chunks, rounded once
        for part in _parts(len(labels), ctx.chunk):
            column, inside = _local_column(labels[part], weight, ctx.group)
            column = torch.where(inside, column, -1)
            of_logits = _gradient(F.linear(rows[part], weight), normalisers[part], column, gradient[part])
            torch.mm(of_logits, weight, out=of_rows[part])
            of_weight += of_logits.t() @ rows[part]
            del of_logits  # before the next chunk's is allocated
        whole = _reduce_scatter_along_first_dim(of_rows, ctx.group) if ctx.scattered else _reduce(of_rows, ctx.group)
        return whole, of_weight.to(weight.dtype), None, None, None, None


def _normaliser_and_loss(rows: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return two numbers per row: the normaliser log(sum(exp(logits))), and the loss, which is the normaliser minus the label's logit.

    This is a function so that one chunk's logits are freed before the next chunk's are allocated.
    """
    logits = F.linear(rows, weight)
    largest = logits.amax(-1).float()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    column, inside = _local_column(labels, weight, group)
    # Each rank contributes its part of the vocabulary to both sums.
    label_logit = logits.gather(1, column[:, None])[:, 0].float() * inside
    sums = torch.stack([label_logit, _exponentials(logits, largest)])
    dist.all_reduce(sums, group=group)
    normaliser = largest + sums[1].log()
    return normaliser, normaliser - sums[0]


@fused
def _exponentials(logits: Tensor, largest: Tensor) -> Tensor:
    """Return sum(exp(logits - largest)) over this rank's part of the vocabulary."""
    return (logits.float() - largest[:, None]).exp().sum(-1)


@fused
def _gradient(logits: Tensor, normalisers: Tensor, column: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the logits: (softmax - one-hot label) x the gradient of the loss, rounded to the model's precision."""
    at_label = torch.arange(logits.size(1), device=logits.device) == column[:, None]
    softmax = (logits.float() - normalisers[:, None]).exp()
    return ((softmax - at_label.float()) * gradient[:, None]).to(logits.dtype)


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _local_column(labels: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return each label's column in this rank's part of the vocabulary, and whether the label is in that part. If it is not, the
    column is arbitrary but valid."""
    column = labels - group.rank() * len(weight)
    inside = (column >= 0) & (column < len(weight))
    return column.clamp(0, len(weight) - 1), inside
