"""The distributed optimizer's state in a checkpoint: a tensor a parameter and state, each named and placed as its weight is, so
that any layout reads what any other wrote.

megatron-core 0.16.1 has this format too (`fully_reshardable`), and is not used: it gathers the whole state on every rank of a
data-parallel group, where the first writes it all; a load gives all parameters one `step` tensor; and experts cannot change their
ranks. Here a rank writes the parameters whose first element is in its shard, is sent what other shards hold of the last of these,
and reads the parameters of which it holds a part.
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
    """{name here: sharded tensor} of what this rank writes, or reads. model_state: the weights' own."""
    weights = {s.data: s for s in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    found: dict[str, Any] = {}
    for name, part, parameter, pieces in _held(optimizer):
        if is_loading:
            states = {state: torch.empty(parameter.shape, dtype=torch.float32) for state in STATES}
        else:
            states = _whole(part, parameter, pieces)
        first = part.data_parallel_group.rank() == min(pieces)
        for state, tensor in states.items():
            found[f"{name}.{state}"] = _described(weights[parameter], state, tensor, first)
    return found


@torch.no_grad()
def put(optimizer: Any, loaded: dict[str, Any], step: int) -> None:
    """Sets the optimizer to what was loaded for `sharded`'s names, after `step` updates."""
    for name, part, parameter, pieces in _held(optimizer):
        mine = pieces[part.data_parallel_group.rank()]
        held = {state: loaded[f"{name}.{state}"].view(-1)[mine] for state in STATES}
        main = _main(part, parameter)
        if isinstance(part.optimizer, HostAdam):
            for state, tensor in held.items():
                part.optimizer.state[main][state].copy_(tensor)
            part.optimizer.state[main]["step"] = step
            continue
        main.copy_(held.pop("param"))
        moments = {state: tensor.to(main.device, copy=True) for state, tensor in held.items()}
        part.optimizer.state[main] = {"step": torch.tensor(float(step), device=main.device), **moments}


def _held(optimizer: Any) -> Iterator[tuple[str, Any, Tensor, dict[int, slice]]]:
    """Every parameter of which this rank holds a part, in the same order on all ranks: a name of it here, the optimizer it
    is in, and as `_pieces` gives it. Experts have an optimizer of their own where their ranks are not those of the attention."""
    for number, part in enumerate(parts_of(optimizer)):
        if isinstance(part.optimizer, HostAdam):
            part.optimizer.finish()
        me = part.data_parallel_group.rank()
        for order, (parameter, pieces) in enumerate(_pieces(part)):
            if me in pieces:
                yield f"optimizer.{number}.{order}", part, parameter, pieces


def _main(part: Any, parameter: Tensor) -> Tensor:
    """This rank's part of the weights that the optimizer updates, flat: in fp32, save where it has its fp32 weights elsewhere."""
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order]


def _described(weight: Any, name: str, state: Tensor, first: bool) -> Any:
    """The weight's place in the whole model, with a state in place of its data. first: whether this is the first of the
    data-parallel ranks that hold a part."""
    described = replace(
        weight,
        key=f"optimizer.state.{name}.{weight.key}",
        data=state,
        replica_id=(*weight.replica_id[:2], 0 if first else 1),
        **({} if isinstance(weight, ShardedTensorFactory) else {"dtype": state.dtype}),
    )
    described.validate_metadata_integrity()
    return described


def _pieces(part: Any) -> Iterator[tuple[Tensor, dict[int, slice]]]:
    """Every parameter with the data-parallel ranks that hold a part, and that part, flat."""
    size = part.data_parallel_group.size()
    for buffer in part.buffers:
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


def _whole(part: Any, parameter: Tensor, pieces: dict[int, slice]) -> dict[str, Tensor]:
    """A parameter's states in its shape, on the first rank that holds a part; the others send theirs and get nothing.

    Called on all ranks of `pieces`, in the same order of parameters.
    """
    group = part.data_parallel_group
    me, owner = group.rank(), min(pieces)
    main = _main(part, parameter)
    held = {"param": main, **part.optimizer.state[main]}  # a `HostAdam` has its own "param"
    if len(pieces) == 1:
        return {name: held[name].detach().view(parameter.shape) for name in STATES}
    whole = {}
    for name in STATES:
        mine = held[name].detach().to(parameter.device)  # NCCL sends what is on a GPU
        if me != owner:
            dist.send(mine, group=group, group_dst=owner)
            continue
        state = torch.empty(parameter.numel(), dtype=mine.dtype, device=mine.device)
        state[pieces[me]] = mine
        for rank in pieces.keys() - {me}:
            dist.recv(state[pieces[rank]], group=group, group_src=rank)
        whole[name] = state.view(parameter.shape)
    return whole
