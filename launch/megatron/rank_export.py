"""Hugging Face export of one rank. Tensors are gathered over tensor parallelism and written to safetensors files."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from launch.weights import hf_names
from launch.weights.hf_folder import FILE_BYTES
from launch.weights.safetensors_folder import SafetensorsFolder
from recipes.checkpoint.tensors import is_mtp, links
from recipes.config import Model, Mtp


@torch.no_grad()
def write_shard(
    folder: Path, chunks: list[Any], m: Model, rank: int, value: Callable[[Tensor], Tensor] = lambda weight: weight
) -> dict[str, str]:
    """Write the tensors for which this rank is responsible, each in its base's dtype. Return {tensor: file}.

    All ranks call this together, because tensor-parallel parts are gathered on all ranks of their group. value: maps a weight to the
    tensor that is written for it, which has the weight's shape; by default the weight itself.
    """
    base = SafetensorsFolder(Path(m.checkpoint))
    written: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            file = f"rank{rank:05}-{len(set(written.values())):05}.safetensors"
            save_file(pending, folder / file, metadata={"format": "pt"})
            written.update(dict.fromkeys(pending, file))
            pending.clear()

    for name, tensor in itertools.chain(hf_tensors(chunks, m, value), _mtp(base, m) if rank == 0 else ()):
        pending[name] = tensor.detach().to("cpu", base.read(name).dtype).contiguous().clone()
        if sum(t.nbytes for t in pending.values()) >= FILE_BYTES:
            flush()
    flush()
    return written


def hf_tensors(chunks: list[Any], m: Model, value: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors for which this rank is responsible, whole, under their Hugging Face names. value: as in `write_shard`."""
    table = links(m)
    for name, tensor in hf_names.global_tensors(chunks, m):
        if name == "output_layer.weight" and m.tied:
            continue  # the last pipeline stage's copy of the embedding
        link, sharding = table[name], hf_names.tensor_parallel(name, tensor)
        tensor = value(tensor)
        if sharding is not None and sharding[0].size() > 1:
            group, axis = sharding
            parts = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(parts, tensor.contiguous(), group=group)
            tensor = hf_names.unshard(link, parts, axis)
        if _writes(name):
            yield from zip(link.hf, hf_names.split(link, tensor, m), strict=True)


def _mtp(base: SafetensorsFolder, m: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's multi-token-prediction layers unchanged, if the recipe copies them."""
    if m.mtp is Mtp.copy:
        yield from ((name, base.read(name)) for name in base.files if is_mtp(name, m))


def _writes(name: str) -> bool:
    """Return whether this rank writes the tensor: it is the first of the ranks that hold the same gathered tensor."""
    if ".experts." in name:
        replicas = parallel_state.get_expert_data_parallel_group()
        parts = parallel_state.get_expert_tensor_parallel_group()
    else:
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        parts = parallel_state.get_tensor_model_parallel_group()
    return replicas.rank() == 0 and parts.rank() == 0
