"""Which rank writes and reads which part of the distributed optimizer's state, in Megatron's `fully_reshardable` format.

megatron-core 0.16.1 gathers the whole state on every rank of a data-parallel group, where the first writes it all; at a load every
rank reads all of it. Here a rank writes the parameters whose first element is in its shard, is sent what other shards hold of the
last of these, and reads the parameters of which it holds a part. The files' content is the same: a tensor a parameter and state.
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

_STATES = ("param", "exp_avg", "exp_avg_sq")


@torch.no_grad()
def sharded(
    optimizer: Any, model_state: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[int, Any]:
    """{number of a parameter: {state: sharded tensor}} of what this rank writes, or reads; in the place of
    `DistributedOptimizer.sharded_param_state_fully_reshardable`."""
    weights = {s.data: s for s in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    me = optimizer.data_parallel_group.rank()
    found = {}
    for number, (parameter, pieces) in enumerate(_pieces(optimizer)):
        if me not in pieces:
            continue
        if is_loading:
            states = {name: torch.empty_like(parameter, dtype=torch.float32) for name in _STATES}
        else:
            states = _whole(optimizer, parameter, pieces)
        first = me == min(pieces)
        found[number] = {name: _described(weights[parameter], name, state, first) for name, state in states.items()}
    return {number: states for number, states in found.items() if states}


def _described(weight: Any, name: str, state: Tensor, first: bool) -> Any:
    """The weight's place in the whole model, with a state in place of its data. first: of the data-parallel ranks."""
    described = replace(
        weight,
        key=f"optimizer.state.{name}.{weight.key}",
        data=state,
        replica_id=(*weight.replica_id[:2], 0 if first else 1),
        **({} if isinstance(weight, ShardedTensorFactory) else {"dtype": state.dtype}),
    )
    described.validate_metadata_integrity()
    return described


def _pieces(optimizer: Any) -> Iterator[tuple[Tensor, dict[int, slice]]]:
    """Every parameter, in the order the load numbers them, with the data-parallel ranks that hold a part and that part, flat."""
    size = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            shard = buffer.buckets[bucket].grad_data.numel() // size
            first = start - buffer.buckets[bucket].offset  # of the parameter, in its bucket
            last = first + end - start
            yield (
                parameter,
                {
                    rank: slice(max(rank * shard, first) - first, min((rank + 1) * shard, last) - first)
                    for rank in range(first // shard, (last - 1) // shard + 1)
                },
            )


def _whole(optimizer: Any, parameter: Tensor, pieces: dict[int, slice]) -> dict[str, Tensor]:
    """A parameter's states in its shape, on the first rank that holds a part; the others send theirs and get nothing.

    Called on all ranks of `pieces`, in the same order of parameters.
    """
    group = optimizer.data_parallel_group
    me, owner = group.rank(), min(pieces)
    held = optimizer._get_main_param_and_optimizer_states(parameter)
    if len(pieces) == 1:
        return {name: held[name].detach().view(parameter.shape) for name in _STATES}
    whole = {}
    for name in _STATES:
        mine = held[name].detach()
        if me != owner:
            dist.send(mine, group=group, group_dst=owner)
            continue
        state = torch.empty(parameter.numel(), dtype=mine.dtype, device=mine.device)
        state[pieces[me]] = mine
        for rank in pieces.keys() - {me}:
            dist.recv(state[pieces[rank]], group=group, group_src=rank)
        whole[name] = state.view(parameter.shape)
    return whole
