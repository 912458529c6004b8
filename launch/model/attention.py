"""Packed attention: block-diagonal and causal over the sequences of one micro-batch, with zigzag context parallelism.

With context parallelism of n, a sequence is cut into 2n equal chunks and rank r holds chunks r and 2n-1-r: every
rank then has the same share of the causal triangle. Keys and values are gathered, queries stay where they are.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def zigzag_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Positions, in order, that `rank` of `ranks` holds of a sequence of `length` tokens, a multiple of 2 x ranks."""
    chunk = length // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


class PackedAttention(MegatronModule):
    """Core attention of Megatron's `SelfAttention` for packed (thd) batches; no parameters."""

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        groups = kwargs.get("pg_collection")
        self.cp_group = groups.cp if groups is not None else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """query [t, heads, d], key and value [t, kv_heads, d], t this rank's tokens -> [t, heads x d]."""
        boundaries = packed_seq_params.cu_seqlens_q
        ranks = self.cp_group.size()
        if query.is_cuda and ranks == 1:
            return self._varlen(query, key, value, packed_seq_params).flatten(1)
        lengths = ((boundaries[1:] - boundaries[:-1]) // ranks).tolist()
        if ranks == 1:
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            return torch.cat([self._causal(q, k, v) for q, k, v in parts]).flatten(1)
        # [ranks, t, kv_heads, d]; the backward of this gather sums over ranks and returns each its own part.
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).unflatten(0, (ranks, -1))
            for x in (key, value)
        )
        parts = zip(query.split(lengths), key.split(lengths, dim=1), value.split(lengths, dim=1), strict=True)
        return torch.cat([self._zigzag(q, k.flatten(0, 1), v.flatten(0, 1)) for q, k, v in parts]).flatten(1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )
        return out.squeeze(0).transpose(0, 1)

    def _zigzag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q holds this rank's two chunks of a sequence, k and v all ranks' chunks, rank after rank."""
        ranks = self.cp_group.size()
        held = [zigzag_positions(len(k), ranks, rank).to(q.device) for rank in range(ranks)]
        return self._causal(q, k, v, held[self.cp_group.rank()][:, None] >= torch.cat(held)[None])

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = packed.max_seqlen_q
        out: Tensor = varlen_attn(
            q, k, v, packed.cu_seqlens_q, packed.cu_seqlens_q, longest, longest,
            scale=self.scale, window_size=(-1, 0), enable_gqa=q.size(1) != k.size(1),
        )  # type: ignore[assignment]  # fmt: skip
        return out
