"""One mapping between Megatron's parameter names and Hugging Face's, used to load and to export.

Both engines use it, and the export of a checkpoint, which is without Megatron: it is imported where a rank asks for its own
tensors. A Megatron tensor joins one or more Hugging Face tensors:

| join | Megatron's tensor |
|---|---|
| same | the one tensor |
| qkv | for every key-value group its queries, its key, its value |
| gate_up | gate over up; under tensor parallelism each rank holds its part of both |
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from recipes.config import Model
from recipes.errors import CheckpointError


class Join(Enum):
    same = "same"
    qkv = "qkv"
    gate_up = "gate_up"


@dataclass(frozen=True)
class Link:
    """The Hugging Face tensors that one Megatron tensor joins, in order."""

    hf: tuple[str, ...]
    join: Join = Join.same


def links(m: Model) -> dict[str, Link]:
    """Every parameter and the expert bias, by its global Megatron name (layers and experts counted over all ranks)."""
    found = {
        "embedding.word_embeddings.weight": Link(("model.embed_tokens.weight",)),
        "decoder.final_layernorm.weight": Link(("model.norm.weight",)),
        "output_layer.weight": Link(("model.embed_tokens.weight" if m.tied else "lm_head.weight",)),
    }
    for i in range(m.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        found[ours + "self_attention.linear_qkv.layer_norm_weight"] = Link((theirs + "input_layernorm.weight",))
        for part in ("weight", "bias") if m.qkv_bias else ("weight",):
            found[f"{ours}self_attention.linear_qkv.{part}"] = Link(
                tuple(f"{attention}{c}_proj.{part}" for c in "qkv"), Join.qkv
            )
        found[ours + "self_attention.linear_proj.weight"] = Link((attention + "o_proj.weight",))
        if m.qk_norm:
            for c in "qk":
                found[f"{ours}self_attention.{c}_layernorm.weight"] = Link((f"{attention}{c}_norm.weight",))
        norm = Link((theirs + "post_attention_layernorm.weight",))
        if i < m.dense_layers or not m.experts:
            found[ours + "mlp.linear_fc1.layer_norm_weight"] = norm
            found |= _mlp(ours + "mlp.", theirs + "mlp.")
            continue
        found[ours + "pre_mlp_layernorm.weight"] = norm
        found[ours + "mlp.router.weight"] = Link((theirs + "mlp.gate.weight",))
        found[ours + "mlp.router.expert_bias"] = Link((theirs + "mlp.gate.e_score_correction_bias",))
        if m.shared_experts:
            found |= _mlp(ours + "mlp.shared_experts.", theirs + "mlp.shared_experts.")
        for e in range(m.experts):
            found |= _mlp(ours + "mlp.experts.", f"{theirs}mlp.experts.{e}.", str(e))
    return found


def _mlp(ours: str, theirs: str, expert: str = "") -> dict[str, Link]:
    return {
        f"{ours}linear_fc1.weight{expert}": Link(
            (theirs + "gate_proj.weight", theirs + "up_proj.weight"), Join.gate_up
        ),
        f"{ours}linear_fc2.weight{expert}": Link((theirs + "down_proj.weight",)),
    }


def join(link: Link, parts: list[Tensor], m: Model) -> Tensor:
    """The whole Megatron tensor from its Hugging Face tensors."""
    if link.join is Join.same:
        return parts[0]
    if link.join is Join.gate_up:
        return torch.cat(parts)
    return torch.cat([p.unflatten(0, (m.kv_heads, -1)) for p in parts], dim=1).flatten(0, 1)


def split(link: Link, whole: Tensor, m: Model) -> list[Tensor]:
    """The inverse of `join`."""
    if link.join is Join.same:
        return [whole]
    if link.join is Join.gate_up:
        return list(whole.chunk(2))
    queries = m.heads // m.kv_heads
    sizes = [queries * m.head_dim, m.head_dim, m.head_dim]
    return [p.flatten(0, 1) for p in whole.unflatten(0, (m.kv_heads, -1)).split(sizes, dim=1)]


def shard(link: Link, whole: Tensor, axis: int, ranks: int, rank: int) -> Tensor:
    """The part of a whole Megatron tensor that one of `ranks` tensor-parallel ranks holds, cut along `axis`."""
    if link.join is Join.gate_up:
        return torch.cat([half.chunk(ranks, axis)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, axis)[rank]


def unshard(link: Link, shards: list[Tensor], axis: int) -> Tensor:
    """The inverse of `shard`, from all ranks' parts in order."""
    if link.join is Join.gate_up:
        gates, ups = zip(*(s.chunk(2) for s in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, axis)


def global_tensors(chunks: list[Any], m: Model) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters and expert biases under their global names."""
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
    """The group that holds the parts of this tensor and the axis it is cut along; None where it is whole."""
    from megatron.core import parallel_state

    if not getattr(tensor, "tensor_model_parallel", False):
        return None
    if ".experts." in name:
        return parallel_state.get_expert_tensor_parallel_group(), tensor.partition_dim  # type: ignore[attr-defined]
    return parallel_state.get_tensor_model_parallel_group(), tensor.partition_dim  # type: ignore[attr-defined]


@torch.no_grad()
def load(chunks: list[Any], m: Model, read: Callable[[str], Tensor]) -> None:
    """Sets every weight of this rank from Hugging Face tensors; `read` gives one by name.

    Raises `CheckpointError` where a shape differs. The expert bias keeps its fp32 value bit for bit.
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
                f"{', '.join(link.hf)}: shape {list(whole.shape)} on this rank, the recipe's model has {list(tensor.shape)}",
                "check model.* against the checkpoint's config.json",
            )
        if name.endswith("expert_bias"):
            tensor.data = whole.to(tensor.device, torch.float32)
        else:
            tensor.copy_(whole)


def is_mtp(name: str, m: Model) -> bool:
    """Whether a Hugging Face tensor belongs to a multi-token-prediction layer, numbered after the model's own."""
    words = name.split(".")
    return words[:2] == ["model", "layers"] and int(words[2]) >= m.layers
