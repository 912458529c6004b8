"""The distributed optimizer's state in a checkpoint: one tensor per parameter and state. Each tensor is named and placed like its
weight, so any layout can read a checkpoint of any other.

megatron-core 0.16.1 also has this format (`fully_reshardable`), but it is not used, for three reasons. It gathers the whole state
on every rank of a data-parallel group, and the first rank writes all of it. A load gives all parameters one shared `step` tensor.
Experts cannot change their ranks.

Here a rank writes the parameters whose first element is in its shard. The last of these may extend into other shards; their ranks
send the missing parts. A rank reads the parameters of which it holds a part.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from launch.megatron.host_adam import STATES, HostAdam, parts_of


@torch.no_grad()
def sharded(optimizer: Any, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Return {local name: sharded tensor} for everything this rank writes, or reads if `is_loading`.

    model_state: the sharded tensors of the weights.
    """
    weights = {s.data: s for s in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    tensors: dict[str, Any] = {}
    for name, part, parameter, slices in _local_parameters(optimizer):
        if is_loading:
            states = {state: torch.empty(parameter.shape, dtype=torch.float32) for state in STATES}
        else:
            states = _gathered(part, parameter, slices)
        is_owner = part.data_parallel_group.rank() == min(slices)
        for state, tensor in states.items():
            tensors[f"{name}.{state}"] = _like_weight(weights[parameter], state, tensor, is_owner)
    return tensors


@torch.no_grad()
def put(optimizer: Any, loaded: dict[str, Any], step: int) -> None:
    """Set the optimizer's state after `step` updates. loaded: the tensors under the names that `sharded` returned."""
    for name, part, parameter, slices in _local_parameters(optimizer):
        local_slice = slices[part.data_parallel_group.rank()]
        local = {state: loaded[f"{name}.{state}"].view(-1)[local_slice] for state in STATES}
        main = _main(part, parameter)
        if isinstance(part.optimizer, HostAdam):
            for state, tensor in local.items():
                part.optimizer.state[main][state].copy_(tensor)
            part.optimizer.state[main]["step"] = step
            continue
        main.copy_(local.pop("param"))
        moments = {state: tensor.to(main.device, copy=True) for state, tensor in local.items()}
        part.optimizer.state[main] = {"step": torch.tensor(float(step), device=main.device), **moments}


def _local_parameters(optimizer: Any) -> Iterator[tuple[str, Any, Tensor, dict[int, slice]]]:
    """Yield every parameter of which this rank holds a part, in the same order on all ranks.

    Yield a local name, the distributed optimizer that holds the parameter, and the parameter with its slices as `_sharding` yields
    them. Experts have their own optimizer if their data-parallel ranks differ from attention's.
    """
    for number, part in enumerate(parts_of(optimizer)):
        if isinstance(part.optimizer, HostAdam):
            part.optimizer.finish()
        rank = part.data_parallel_group.rank()
        for order, (parameter, slices) in enumerate(_sharding(part)):
            if rank in slices:
                yield f"optimizer.{number}.{order}", part, parameter, slices


def _main(part: Any, parameter: Tensor) -> Tensor:
    """Return this rank's part of the parameter that the optimizer updates, flat. It is fp32, unless the optimizer holds its fp32
    weights elsewhere (`HostAdam`)."""
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order]


def _like_weight(weight: Any, name: str, state: Tensor, is_owner: bool) -> Any:
    """Return a state as a sharded tensor at its weight's position in the model.

    is_owner: whether this is the first of the data-parallel ranks that hold a part; only that rank writes.
    """
    sharded_state = replace(
        weight,
        key=f"optimizer.state.{name}.{weight.key}",
        data=state,
        replica_id=(*weight.replica_id[:2], 0 if is_owner else 1),
        **({} if isinstance(weight, ShardedTensorFactory) else {"dtype": state.dtype}),
    )
    sharded_state.validate_metadata_integrity()
    return sharded_state


def _sharding(part: Any) -> Iterator[tuple[Tensor, dict[int, slice]]]:
    """Yield every parameter with {data-parallel rank: slice of the flat parameter that it holds}."""
    size = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            shard = buffer.buckets[bucket].grad_data.numel() // size
            first = start - buffer.buckets[bucket].offset  # the parameter's elements in its bucket
            last = first + end - start
            yield (
                parameter,
                {
                    rank: slice(max(rank * shard, first) - first, min((rank + 1) * shard, last) - first)
                    for rank in range(first // shard, (last - 1) // shard + 1)
                },
            )


def _gathered(part: Any, parameter: Tensor, slices: dict[int, slice]) -> dict[str, Tensor]:
    """Return a parameter's states in its shape on the owner, the first rank that holds a part. Other ranks send their parts and
    return an empty dict.

    All ranks of `slices` call this, in the same order of parameters.
    """
    group = part.data_parallel_group
    rank, owner = group.rank(), min(slices)
    main = _main(part, parameter)
    local = {"param": main, **part.optimizer.state[main]}  # the state of a `HostAdam` overrides "param"
    if len(slices) == 1:
        return {name: local[name].detach().view(parameter.shape) for name in STATES}
    gathered = {}
    for name in STATES:
        local_part = local[name].detach().to(parameter.device)  # NCCL can only send from a GPU
        if rank != owner:
            dist.send(local_part, group=group, group_dst=owner)
            continue
        state = torch.empty(parameter.numel(), dtype=local_part.dtype, device=local_part.device)
        state[slices[rank]] = local_part
        for sender in slices.keys() - {rank}:
            dist.recv(state[slices[sender]], group=group, group_src=sender)
        gathered[name] = state.view(parameter.shape)
    return gathered
