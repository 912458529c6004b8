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
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from launch.model.host import onto
from launch.model.kept import Kept
from launch.model.rotary import Rotation, rotate, rotation
from recipes.config import Model


@dataclass
class Packed(PackedSeqParams):
    """What Megatron hands to every layer of a micro-batch.

    boundaries [sequences + 1] int32: of the padded sequences over all context-parallel ranks. lengths: of each, on the host, where
    reading them makes no GPU wait. rotation: of this rank's tokens.
    """

    boundaries: Tensor = None  # type: ignore[assignment]
    lengths: tuple[int, ...] = ()
    rotation: Rotation = None  # type: ignore[assignment]


def packed_of(m: Model, lengths: Sequence[int], device: torch.device, ranks: int = 1, rank: int = 0) -> Packed:
    """Of sequences with so many padded tokens, of which `rank` of `ranks` context-parallel ones holds its part."""
    positions = torch.cat([zigzag_positions(n, ranks, rank) if ranks > 1 else torch.arange(n) for n in lengths])
    return Packed(
        qkv_format="thd",
        boundaries=onto(device, torch.tensor([0, *lengths]).cumsum(0).int()),
        lengths=tuple(lengths),
        rotation=rotation(m, onto(device, positions)),
    )


def zigzag_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Positions, in order, that `rank` of `ranks` holds of a sequence of `length` tokens, a multiple of 2 x ranks."""
    chunk = length // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


class PackedAttention(MegatronModule):
    """Core attention of Megatron's `SelfAttention` for packed (thd) batches, and the rotation before it; no parameters.

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
        packed_seq_params: Packed,
        **_: Any,
    ) -> Tensor:
        """query [t, heads, d], key and value [t, kv_heads, d], t this rank's tokens -> [t, heads x d]."""
        query, key = rotate(query, packed_seq_params.rotation), rotate(key, packed_seq_params.rotation)
        kernel = partial(self._kernel, packed_seq_params)
        out = self.kept.run(kernel, query, key, value) if self.kept else kernel(query, key, value)
        return out.flatten(1)

    def _kernel(self, packed: Packed, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ranks = self.cp_group.size()
        if ranks == 1:
            return attend(query, key, value, packed, self.scale)
        # [ranks, t, kv_heads, d]; the backward of this gather sums over ranks and returns each its own part.
        key, value = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group).unflatten(0, (ranks, -1))
            for x in (key, value)
        )
        lengths = [n // ranks for n in packed.lengths]
        parts = zip(query.split(lengths), key.split(lengths, dim=1), value.split(lengths, dim=1), strict=True)
        return torch.cat([self._zigzag(q, k.flatten(0, 1), v.flatten(0, 1)) for q, k, v in parts])

    def _zigzag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q holds this rank's two chunks of a sequence, k and v all ranks' chunks, rank after rank."""
        ranks = self.cp_group.size()
        held = [zigzag_positions(len(k), ranks, rank).to(q.device) for rank in range(ranks)]
        return _causal(q, k, v, self.scale, held[self.cp_group.rank()][:, None] >= torch.cat(held)[None])


def attend(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """Of whole sequences: query [t, heads, d], key and value [t, kv_heads, d] -> [t, heads, d]."""
    if query.is_cuda:
        return varlen(query, key, value, packed, scale)
    parts = zip(*(x.split(packed.lengths) for x in (query, key, value)), strict=True)
    return torch.cat([_causal(q, k, v, scale) for q, k, v in parts])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.squeeze(0).transpose(0, 1)


def varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """PyTorch's flash attention over packed sequences, from 2.11 on: bf16 or fp16, on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packed.lengths)
    grouped: dict[str, Any] = {"enable_gqa": True} if query.size(1) != key.size(1) and _asks_for_gqa() else {}
    out: Tensor = varlen_attn(
        query, key, value, packed.boundaries, packed.boundaries, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )  # type: ignore[assignment]  # fmt: skip
    return out


@cache
def _asks_for_gqa() -> bool:
    """torch 2.11 takes fewer key heads than query heads without being told."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
