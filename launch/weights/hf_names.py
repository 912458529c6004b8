"""Convert Hugging Face tensors to Megatron's parameters and back, for loading and export.

The names come from `recipes/checkpoint/tensors.py`. Both engines use this module, and so does the export of a checkpoint, which
runs without Megatron. Megatron is therefore imported only in functions that a rank calls for its own tensors.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recipes.checkpoint.tensors import links
from recipes.config import Model
from recipes.errors import CheckpointError
from recipes.families.common.parts import Join, Link


def join(link: Link, parts: list[Tensor], m: Model) -> Tensor:
    """Return the full Megatron tensor from its Hugging Face tensors."""
    if link.join is Join.same:
        return parts[0]
    if link.join is Join.gate_up:
        return torch.cat(parts)
    return torch.cat([p.unflatten(0, (m.kv_heads, -1)) for p in parts], dim=1).flatten(0, 1)


def split(link: Link, whole: Tensor, m: Model) -> list[Tensor]:
    """Return the Hugging Face tensors of a full Megatron tensor: the inverse of `join`."""
    if link.join is Join.same:
        return [whole]
    if link.join is Join.gate_up:
        return list(whole.chunk(2))
    queries = m.heads // m.kv_heads
    sizes = [queries * m.head_dim, m.head_dim, m.head_dim]
    return [p.flatten(0, 1) for p in whole.unflatten(0, (m.kv_heads, -1)).split(sizes, dim=1)]


def shard(link: Link, whole: Tensor, axis: int, ranks: int, rank: int) -> Tensor:
    """Return the shard of a full Megatron tensor for one of `ranks` tensor-parallel ranks, cut along `axis`."""
    if link.join is Join.gate_up:
        return torch.cat([half.chunk(ranks, axis)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, axis)[rank]


def unshard(link: Link, shards: list[Tensor], axis: int) -> Tensor:
    """Return the full tensor from the shards of all ranks in order: the inverse of `shard`."""
    if link.join is Join.gate_up:
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, axis)


def global_tensors(chunks: list[Any], m: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield (global name, tensor) for this rank's parameters and expert biases."""
    from megatron.core import parallel_state

    first_expert = 0
    if m.experts:
        local = m.experts // parallel_state.get_expert_model_parallel_world_size()
        first_expert = local * parallel_state.get_expert_model_parallel_rank()
    for chunk in chunks:
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        biases = ((n, b) for n, b in chunk.named_buffers() if n.endswith("expert_bias"))
        for name, tensor in [*chunk.named_parameters(), *biases]:
            words = name.split(".")
            if name.startswith("decoder.layers."):
                words[2] = str(numbers[int(words[2])])
            if ".experts." in name:
                words[-1] = f"weight{int(words[-1].removeprefix('weight')) + first_expert}"
            yield ".".join(words), tensor


def tensor_parallel(name: str, tensor: Tensor) -> tuple[Any, int] | None:
    """Return the process group that shards this tensor and the axis of the cut; None if the tensor is not sharded."""
    from megatron.core import parallel_state

    if not getattr(tensor, "tensor_model_parallel", False):
        return None
    if ".experts." in name:
        return parallel_state.get_expert_tensor_parallel_group(), tensor.partition_dim  # type: ignore[attr-defined]
    return parallel_state.get_tensor_model_parallel_group(), tensor.partition_dim  # type: ignore[attr-defined]


@torch.no_grad()
def load(chunks: list[Any], m: Model, read: Callable[[str], Tensor]) -> None:
    """Set every weight of this rank from Hugging Face tensors. read: returns one tensor by name.

    Raise `CheckpointError` if a shape differs. The expert bias is loaded in fp32, bit for bit.
    """
    table = links(m)
    for name, tensor in global_tensors(chunks, m):
        link = table[name]
        whole = join(link, [read(n) for n in link.hf], m)
        if (cut := tensor_parallel(name, tensor)) is not None:
            group, axis = cut
            whole = shard(link, whole, axis, group.size(), group.rank())
        if whole.shape != tensor.shape:
            raise CheckpointError(
                f"{', '.join(link.hf)}: the checkpoint gives shape {list(whole.shape)} on this rank, but the recipe's model needs "
                f"{list(tensor.shape)}",
                "check model.* against the checkpoint's config.json",
            )
        if name.endswith("expert_bias"):
            tensor.data = whole.to(tensor.device, torch.float32)
        else:
            tensor.copy_(whole)
