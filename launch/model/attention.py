"""Packed attention: block-diagonal and causal over the sequences of one micro-batch, with zigzag context parallelism. PyTorch's
varlen flash attention on a GPU, sequence by sequence its SDPA on a CPU.

With context parallelism of n, a sequence is cut into 2n equal chunks and rank r holds chunks r and 2n-1-r: every
rank then has the same share of the causal triangle. Keys and values are gathered, queries stay where they are.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from launch.model.attention_reuse import Kept
from launch.model.offload_streams import onto
from launch.model.rotary import Rotation, rotate, rotation
from recipes.config import Model


@dataclass
class Packed(PackedSeqParams):
    """What Megatron hands to every layer of a micro-batch, and the embedded engine's two additions to it. The layers take either:
    slime hands them Megatron's own.

    cu_seqlens_q [sequences + 1] int32, Megatron's: where the padded sequences begin and end, over all context-parallel ranks.
    lengths: of each, on the host, where reading them makes no GPU wait. rotation: of this rank's tokens, by which `PackedAttention`
    rotates in Megatron's place.
    """

    lengths: tuple[int, ...] = ()
    rotation: Rotation = None  # type: ignore[assignment]


def packed_of(m: Model, lengths: Sequence[int], device: torch.device, ranks: int = 1, rank: int = 0) -> Packed:
    """Of sequences with so many padded tokens, of which `rank` of `ranks` context-parallel ones holds its part."""
    positions = torch.cat([zigzag_positions(n, ranks, rank) if ranks > 1 else torch.arange(n) for n in lengths])
    boundaries = onto(device, torch.tensor([0, *lengths]).cumsum(0).int())
    return Packed(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=tuple(lengths),
        rotation=rotation(m, onto(device, positions)),
    )


def lengths_of(packed: PackedSeqParams) -> tuple[int, ...]:
    """Padded tokens of each sequence, over all context-parallel ranks."""
    if isinstance(packed, Packed):
        return packed.lengths
    return tuple(packed.cu_seqlens_q.diff().tolist())


def zigzag_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Positions, in order, that `rank` of `ranks` holds of a sequence of `length` tokens, a multiple of 2 x ranks."""
    chunk = length // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


class RotatedOnce(SelfAttention):
    """Megatron's self attention. Raises `ValueError` where queries and keys would be rotated twice, or not at all: Megatron rotates
    by the positions of its model, `PackedAttention` by those of a `Packed`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        by_megatron = others.get("rotary_pos_emb") is not None
        here = isinstance(others.get("packed_seq_params"), Packed)
        if by_megatron == here:
            raise ValueError(
                f"attention is rotated {'twice' if here else 'by nobody'}: by Megatron, or by launch.model.rotary"
            )
        out: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **others)
        return out


class PackedAttention(MegatronModule):
    """Core attention of Megatron's `SelfAttention` for packed (thd) batches, and the rotation before it where the batch brings its
    own; no parameters.

    kept: set while a layer keeps its kernel's result from one pass to the next.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        groups = kwargs.get("pg_collection")
        self.cp_group = groups.cp if groups is not None else parallel_state.get_context_parallel_group()
        self.kept: Kept | None = None

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
        if isinstance(packed_seq_params, Packed):
            query, key = (rotate(x, packed_seq_params.rotation) for x in (query, key))
        kernel = partial(self._kernel, packed_seq_params)
        out = self.kept.run(kernel, query, key, value) if self.kept else kernel(query, key, value)
        return out.flatten(1)

    def _kernel(self, packed: PackedSeqParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ranks = self.cp_group.size()
        if ranks == 1:
            return attend(query, key, value, packed, self.scale)
        # [ranks, t, kv_heads, d]; the backward of this gather sums over ranks and returns each its own part.
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).unflatten(0, (ranks, -1))
            for x in (key, value)
        )
        lengths = [n // ranks for n in lengths_of(packed)]
        parts = zip(query.split(lengths), key.split(lengths, dim=1), value.split(lengths, dim=1), strict=True)
        return torch.cat([self._zigzag(q, k.flatten(0, 1), v.flatten(0, 1)) for q, k, v in parts])

    def _zigzag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q holds this rank's two chunks of a sequence, k and v all ranks' chunks, rank after rank."""
        ranks = self.cp_group.size()
        held = [zigzag_positions(len(k), ranks, rank).to(q.device) for rank in range(ranks)]
        return _causal(q, k, v, self.scale, held[self.cp_group.rank()][:, None] >= torch.cat(held)[None])


def attend(query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """Of whole sequences: query [t, heads, d], key and value [t, kv_heads, d] -> [t, heads, d]."""
    if query.is_cuda:
        return varlen(query, key, value, packed, scale)
    lengths = lengths_of(packed)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    return torch.cat([_causal(q, k, v, scale) for q, k, v in parts])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.squeeze(0).transpose(0, 1)


def varlen(query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, scale: float) -> Tensor:
    """PyTorch's flash attention over packed sequences, from 2.11 on: bf16 or fp16, on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.size(1) != key.size(1) and _asks_for_gqa() else {}
    out: Tensor = varlen_attn(
        query, key, value, packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv, scale=scale,
        window_size=(-1, 0), **grouped
    )  # type: ignore[assignment]  # fmt: skip
    return out


@cache
def _asks_for_gqa() -> bool:
    """torch 2.11 takes fewer key heads than query heads without being told."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
