"""Cross entropy over a vocabulary that tensor parallelism cuts, some tokens at a time: the logits of all tokens are never held, and
fp32 ones on a GPU not at all.

Forward keeps one number a token; backward computes each chunk's logits again. What it costs is the output layer's product once
more, what it saves 4 x vocabulary / tp bytes a token and the working memory of as much again.
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
    """Megatron's model, whose last stage computes its loss `loss_chunk` tokens at a time."""

    loss_chunk: int

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        """hidden_states [t / tp with sequence parallelism, 1, hidden], labels [1, t] -> the loss of each token, [1, t] fp32."""
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
    """hidden [t, hidden], or this rank's t / tp rows of it where `scattered`; weight [vocabulary / tp, hidden]; labels [t]."""

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
        of_weight = torch.zeros_like(weight, dtype=torch.float32)  # a sum over chunks, rounded once
        for part in _parts(len(labels), ctx.chunk):
            column, inside = _place(labels[part], weight, ctx.group)
            column = torch.where(inside, column, -1)
            of_logits = _gradient(F.linear(rows[part], weight), normalisers[part], column, gradient[part])
            torch.mm(of_logits, weight, out=of_rows[part])
            of_weight += of_logits.t() @ rows[part]
            del of_logits  # before the next one is made
        whole = _reduce_scatter_along_first_dim(of_rows, ctx.group) if ctx.scattered else _reduce(of_rows, ctx.group)
        return whole, of_weight.to(weight.dtype), None, None, None, None


def _normaliser_and_loss(rows: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of each row the logarithm of the sum over the vocabulary, and that less the label's logit. A function of its own, so that one
    chunk's logits are gone before the next one's are made."""
    logits = F.linear(rows, weight)
    largest = logits.amax(-1).float()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    column, inside = _place(labels, weight, group)
    # Of the label, and of all: each rank has those of its part of the vocabulary.
    of_label = logits.gather(1, column[:, None])[:, 0].float() * inside
    sums = torch.stack([of_label, _exponentials(logits, largest)])
    dist.all_reduce(sums, group=group)
    normaliser = largest + sums[1].log()
    return normaliser, normaliser - sums[0]


@fused
def _exponentials(logits: Tensor, largest: Tensor) -> Tensor:
    """Sum over the vocabulary, relative to the largest logit."""
    return (logits.float() - largest[:, None]).exp().sum(-1)


@fused
def _gradient(logits: Tensor, normalisers: Tensor, column: Tensor, gradient: Tensor) -> Tensor:
    """The softmax, less one at the label's column, times the gradient of the loss; rounded to the model's precision."""
    at_label = torch.arange(logits.size(1), device=logits.device) == column[:, None]
    softmax = (logits.float() - normalisers[:, None]).exp()
    return ((softmax - at_label.float()) * gradient[:, None]).to(logits.dtype)


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _place(labels: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The column of each label in this rank's part of the vocabulary, and whether it is there; where it is not, any column."""
    column = labels - group.rank() * len(weight)
    inside = (column >= 0) & (column < len(weight))
    return column.clamp(0, len(weight) - 1), inside
