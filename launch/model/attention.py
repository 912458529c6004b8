"""Packed attention in Megatron's layers: block-diagonal and causal over the sequences of one micro-batch, with zigzag context
parallelism. `attention_kernels.py` holds the kernels.

With context parallelism of size n, each sequence is split into 2n equal chunks. Rank r holds chunks r and 2n-1-r, so every rank has
the same share of the causal triangle. Keys and values are gathered; queries are not moved.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from launch.model.attention_kernels import VARLEN_KERNELS, attend, causal
from launch.model.attention_reuse import CachedCall
from launch.model.offload_streams import onto
from launch.model.rotary import Rotation, rotate, rotation
from recipes.config import AttentionKernel, Model


@dataclass
class Packed(PackedSeqParams):
    """Megatron's description of a packed micro-batch, with three fields that the embedded engine adds. Layers accept both: slime
    passes Megatron's own class.

    cu_seqlens_q: Megatron's, [sequences + 1] int32; boundaries of the padded sequences, over all context-parallel ranks.
    lengths: padded tokens of each sequence, on the host, so that reading them does not wait for the GPU.
    rotation: rotary angles of this rank's tokens; `PackedAttention` applies them in place of Megatron.
    chunks: with context parallelism, this rank's chunks and the keys that each of them sees (`zigzag_chunks`).
    """

    lengths: tuple[int, ...] = ()
    rotation: Rotation = None  # type: ignore[assignment]
    chunks: PackedSeqParams | None = None


def packed_of(m: Model, lengths: Sequence[int], device: torch.device, ranks: int = 1, rank: int = 0) -> Packed:
    """Describe a micro-batch on one context-parallel rank.

    lengths: padded tokens of each sequence, over all `ranks` context-parallel ranks. rank: which of them this one is.
    """
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
        chunks=zigzag_chunks(lengths, device, ranks, rank) if ranks > 1 else None,
    )


def zigzag_chunks(lengths: Sequence[int], device: torch.device, ranks: int, rank: int) -> PackedSeqParams:
    """Describe a rank's chunks as packed sequences of their own. A chunk has all keys of its sequence up to its own end, so its
    queries are the last tokens of its keys. lengths: as in `packed_of`."""
    queries = [n // (2 * ranks) for n in lengths for _ in range(2)]
    keys = [n // (2 * ranks) * chunks for n in lengths for chunks in (rank + 1, 2 * ranks - rank)]
    cu_seqlens = (onto(device, torch.tensor([0, *each]).cumsum(0).int()) for each in (queries, keys))
    return PackedSeqParams("thd", *cu_seqlens, max_seqlen_q=max(queries), max_seqlen_kv=max(keys))


def lengths_of(packed: PackedSeqParams) -> tuple[int, ...]:
    """Return the padded tokens of each sequence, over all context-parallel ranks."""
    if isinstance(packed, Packed):
        return packed.lengths
    return tuple(packed.cu_seqlens_q.diff().tolist())


def zigzag_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Return the positions of a sequence that `rank` of `ranks` holds, in order. length: tokens, a multiple of 2 x ranks."""
    chunk = length // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


class RotatedOnce(SelfAttention):
    """Megatron's self attention, with a check that queries and keys are rotated exactly once.

    Megatron rotates by its model's positions; `PackedAttention` rotates by those of a `Packed`. `forward` raises `ValueError` if
    both would rotate, or neither.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        by_megatron = others.get("rotary_pos_emb") is not None
        by_engine = isinstance(others.get("packed_seq_params"), Packed)
        if by_megatron and by_engine:
            raise ValueError("queries and keys are rotated twice: by Megatron and by launch.model.rotary")
        if not by_megatron and not by_engine:
            raise ValueError("queries and keys are not rotated: neither by Megatron nor by launch.model.rotary")
        out: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **others)
        return out


class PackedAttention(MegatronModule):
    """Core attention of Megatron's `SelfAttention` for packed (thd) batches. If the batch is a `Packed`, it also applies the batch's
    rotation. It has no parameters.

    kernel: what runs on a GPU; with context parallelism it is `varlen` in place of `cudnn`, which takes no chunks.
    cached: set by a recomputed layer that reuses the kernel's result in its second pass; None otherwise.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        kernel: AttentionKernel,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.kernel = kernel
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        groups = kwargs.get("pg_collection")
        self.cp_group = groups.cp if groups is not None else parallel_state.get_context_parallel_group()
        self.cached: CachedCall | None = None

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
        """Attend over the packed sequences: query [t, heads, d], key and value [t, kv_heads, d] -> [t, heads x d].

        t: this rank's tokens. d: head dimension.
        """
        if isinstance(packed_seq_params, Packed):
            query, key = (rotate(x, packed_seq_params.rotation) for x in (query, key))
        kernel = partial(self._kernel, packed_seq_params)
        out = self.cached.run(kernel, query, key, value) if self.cached else kernel(query, key, value)
        return out.flatten(1)

    def _kernel(self, packed: PackedSeqParams, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ranks, lengths = self.cp_group.size(), lengths_of(packed)
        if ranks == 1:
            return attend(self.kernel, query, key, value, packed, lengths, self.scale)
        # [ranks, t, kv_heads, d]; the gather's backward pass sums over the ranks and returns each rank its own part.
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).unflatten(0, (ranks, -1))
            for x in (key, value)
        )
        own = [n // ranks for n in lengths]
        if isinstance(packed, Packed) and query.is_cuda:
            assert packed.chunks is not None
            key, value = (keys_of_chunks(x, own, self.cp_group.rank()) for x in (key, value))
            return VARLEN_KERNELS[self.kernel](query, key, value, packed.chunks, self.scale)
        parts = zip(query.split(own), key.split(own, dim=1), value.split(own, dim=1), strict=True)
        return torch.cat([self._zigzag(q, k.flatten(0, 1), v.flatten(0, 1)) for q, k, v in parts])

    def _zigzag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within one sequence on a CPU. q: this rank's two chunks. k, v: the chunks of all ranks, rank after rank."""
        ranks = self.cp_group.size()
        positions = [zigzag_positions(len(k), ranks, rank).to(q.device) for rank in range(ranks)]
        mask = positions[self.cp_group.rank()][:, None] >= torch.cat(positions)[None]
        return causal(q, k, v, self.scale, mask)


def keys_of_chunks(gathered: Tensor, own: Sequence[int], rank: int) -> Tensor:
    """Return the keys, or the values, of a rank's chunks in the order of `zigzag_chunks`.

    gathered: [ranks, t, heads, d], each rank's two chunks of every sequence. own: tokens of each sequence on one rank.
    """
    ranks, found = len(gathered), []
    for part in gathered.split(list(own), dim=1):
        chunk = part.size(1) // 2
        in_order = torch.cat([part[:, :chunk].flatten(0, 1), part[:, chunk:].flip(0).flatten(0, 1)])
        found += [in_order[: chunk * (rank + 1)], in_order[: chunk * (2 * ranks - rank)]]
    return torch.cat(found)
