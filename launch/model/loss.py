"""Cross entropy over a vocabulary that tensor parallelism cuts, some tokens at a time: the fp32 logits of all tokens are never held.

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
            logits = F.linear(rows[part], weight).float()
            largest = logits.amax(-1)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            column, inside = _place(labels[part], weight, group)
            # Of the label, and of all: each rank has those of its part of the vocabulary.
            sums = torch.stack([logits.gather(1, column[:, None])[:, 0] * inside, torch.empty_like(largest)])
            sums[1] = logits.sub_(largest[:, None]).exp_().sum(-1)
            dist.all_reduce(sums, group=group)
            normalisers[part] = largest + sums[1].log()
            losses[part] = normalisers[part] - sums[0]
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
            # The softmax, less one at the label.
            of_logits = F.linear(rows[part], weight).float().sub_(normalisers[part, None]).exp_()
            column, inside = _place(labels[part], weight, ctx.group)
            of_logits.scatter_add_(1, column[:, None], -inside[:, None].float())
            rounded = of_logits.mul_(gradient[part, None]).to(rows.dtype)
            torch.mm(rounded, weight, out=of_rows[part])
            of_weight += rounded.t() @ rows[part]
        whole = _reduce_scatter_along_first_dim(of_rows, ctx.group) if ctx.scattered else _reduce(of_rows, ctx.group)
        return whole, of_weight.to(weight.dtype), None, None, None, None


def _parts(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _place(labels: Tensor, weight: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The column of each label in this rank's part of the vocabulary, and whether it is there; where it is not, any column."""
    column = labels - group.rank() * len(weight)
    inside = (column >= 0) & (column < len(weight))
    return column.clamp(0, len(weight) - 1), inside
