"""`--spec grouped_spec layer_spec`, this folder being on the path: the reference folder's layers for a CPU, whose experts are saved
as Transformer Engine's are. Theirs have no sharded state of their own: ranks would write their experts over one another's."""

from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from slime_cpu import spec


def weights_state(self, prefix="", sharded_offsets=(), metadata=None):
    """As TEGroupedLinear's: one key for all experts, the global number of each as an axis."""
    groups, found = self.groups, {}
    for i in range(groups.num_local_experts):
        number = groups.ep_group.rank() * groups.num_local_experts + i
        place = (len(sharded_offsets), number, groups.ep_group.size() * groups.num_local_experts)
        one = make_sharded_tensors_for_checkpoint(
            {"weight": getattr(self, f"weight{i}")},
            prefix,
            {},
            (*sharded_offsets, place),
            tp_group=groups.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )[f"{prefix}weight"]
        one.replica_id = (*one.replica_id[:2], groups.dp_group.rank())
        found[f"{prefix}weight{i}"] = one
    return found


class Experts(spec.CPUExperts):
    sharded_state_dict = TEGroupedMLP.sharded_state_dict

    def __init__(self, num_local_experts, config, submodules=None, pg_collection=None, **kw):
        super().__init__(num_local_experts, config, submodules, pg_collection, **kw)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        for weights in (self.linear_fc1, self.linear_fc2):
            object.__setattr__(weights, "groups", self)  # no submodule: it holds this one


spec._Weights.sharded_state_dict = weights_state


def layer_spec(args, config, vp_stage=None):
    block = spec.layer_spec(args, config, vp_stage)
    for layer in block.layer_specs:
        experts = getattr(layer.submodules.mlp.submodules, "experts", None)
        if experts is not None:
            experts.module = Experts
    return block
