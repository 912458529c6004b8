"""Everything of slime and Megatron-LM that this project relies on, as data: its file, what it must be, and its purpose.

`installed.broken` compares a checkout with this data. `flags.txt` lists the names of all flags. The data holds for every version of
`pins.py`. `make test` and `make test-contract` test how a model's layers use Megatron; only the names that they import are listed
here.
"""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What is required of a name."""

    exists = "exists"  # a class, function, field or name of the module; `Class.attribute` of a class or its instances
    takes = "takes"  # a function with exactly these parameters
    calls = "calls"  # code that calls the name with exactly these arguments
    says = "says"  # a text in the code, {} for what is filled in


class Touch(NamedTuple):
    """One requirement. root: `slime` or `megatron`, the checkout that contains `path`. wanted: its meaning depends on `kind`."""

    root: str
    path: str
    kind: Kind
    name: str
    wanted: str
    purpose: str


_ACTOR, _MODEL = "slime/backends/megatron_utils/actor.py", "slime/backends/megatron_utils/model.py"
_DATA, _LOSS = "slime/backends/megatron_utils/data.py", "slime/backends/megatron_utils/loss.py"
_ROLLOUT, _TYPES = "slime/ray/rollout.py", "slime/utils/types.py"
_PROVIDER = "slime/backends/megatron_utils/model_provider.py"
_LOGGING, _METRICS = "slime/observability/logging_utils.py", "slime/observability/train_metric_utils.py"
_STATE, _SCHEDULER = "megatron/core/parallel_state.py", "megatron/core/optimizer_param_scheduler.py"
_ATTENTION, _CHECKPOINTING = "megatron/core/transformer/attention.py", "megatron/training/checkpointing.py"
_YARN = "megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py"
_ACCELERATOR, _GROUPS = "slime/utils/accelerator", "slime/utils/reloadable_process_group.py"


# Where a module was before slime 624b824.
MOVED = {
    _LOGGING: "slime/utils/logging_utils.py",
    _METRICS: "slime/backends/megatron_utils/cp_utils.py",
}
# Modules that slime has since 624b824, and that an older one does without.
NEW = (f"{_ACCELERATOR}/__init__.py", f"{_ACCELERATOR}/base.py")


def _all(root: str, path: str, names: str, purpose: str) -> list[Touch]:
    return [Touch(root, path, Kind.exists, name, "", purpose) for name in names.split()]


def _slime(path: str, kind: Kind, name: str, wanted: str, purpose: str) -> Touch:
    return Touch("slime", path, kind, name, wanted, purpose)


def _megatron(path: str, kind: Kind, name: str, wanted: str, purpose: str) -> Touch:
    return Touch("megatron", path, kind, name, wanted, purpose)


START = [
    *_all("slime", "train_async.py", "train", "the script that is run"),
    _slime("slime/utils/misc.py", Kind.takes, "should_run_periodic_action",
           "rollout_id, interval, num_rollout_per_epoch, num_rollout", "what `stop` answers in its place"),
    _slime("train_async.py", Kind.calls, "should_run_periodic_action",
           "rollout_id, args.save_interval, num_rollout_per_epoch, args.num_rollout", "asked first, whether to save"),
    _slime("train_async.py", Kind.calls, "should_run_periodic_action",
           "rollout_id, args.eval_interval, num_rollout_per_epoch", "asked second, where a stop ends the script"),
    *_all("slime", "slime/utils/arguments.py", "parse_args", "the flags that slime takes are asked of it"),
]  # fmt: skip

STEPS = [
    *_all("slime", _TYPES, "Sample.index Sample.rollout_id Sample.tokens Sample.response_length Sample.loss_mask "
          "Sample.reward Sample.status Sample.Status.COMPLETED", "a planned sequence, handed to slime"),
    _slime(_ROLLOUT, Kind.calls, "call_rollout_fn", "self.generate_rollout, self.args, rollout_id, self.data_source, "
           "evaluation=False", "slime asks `rollout.generate` for a step"),
    *_all("slime", _ROLLOUT, "RolloutManager._split_train_data_by_dp build_dp_schedule",
          "where `rollout.planned` takes the place of slime's schedule"),
    _slime("slime/utils/dp_schedule.py", Kind.takes, "build_dp_schedule",
           "args, train_parallel_config, total_lengths, *, global_batch_size, rollout_indices",
           "what `rollout.planned` is called with"),
    _slime("slime/utils/dp_schedule.py", Kind.says, "", "dp_size", "the number of data-parallel ranks that it is told"),
    _slime(_ACTOR, Kind.calls, "self.rollout_data_postprocess", "self.args, rollout_id, rollout_data",
           "slime hands `rollout.verify` what each trainer got"),
    _slime(_DATA, Kind.says, "", "micro_batch_indices", "the micro-batches that `rollout.verify` compares"),
    _slime(_MODEL, Kind.calls, "custom_before_train_step_hook",
           "args, rollout_id, step_id, model, optimizer, opt_param_scheduler", "slime calls `steps.before`"),
    _slime(_MODEL, Kind.calls, "opt_param_scheduler.step", "increment=step_global_batch_size",
           "a step has been applied: `steps.Steps` counts it"),
    _slime(_MODEL, Kind.calls, "logging_utils.log", "args, log_dict, step_key='train/step'",
           "a step's figures, of which `steps.Log` writes metrics.jsonl"),
    _slime(_LOGGING, Kind.takes, "log", "args, metrics, step_key", "where `steps.Log` listens"),
    _slime(_MODEL, Kind.says, "", "train/{}grad_norm", "the gradient's norm among them"),
    _slime(_MODEL, Kind.says, "", "train/{}{}", "the loss among them"),
    _slime(_LOSS, Kind.says, "", "sft_loss", "which is the mean over supervised tokens"),
    *_all("slime", "slime/backends/megatron_utils/initialize.py", "is_megatron_main_rank", "the rank that has them"),
    _megatron(_SCHEDULER, Kind.takes, "OptimizerParamScheduler.step", "increment", "the learning rate of each step"),
    *_all("megatron", _SCHEDULER, "OptimizerParamScheduler.num_steps", "set from the step's number at each start"),
]  # fmt: skip

HELDOUT = [
    _slime(_DATA, Kind.takes, "get_batch", "data_iterator, keys, pad_multiplier, allgather_cp", "a held-out batch"),
    _slime(_DATA, Kind.takes, "get_data_iterator", "rollout_data", "its sequences"),
    _slime(_DATA, Kind.says, "", "packed_seq_params", "what the model is called with"),
    _slime(_DATA, Kind.says, "", "full_loss_masks", "what the model is called with"),
    _slime(_MODEL, Kind.says, "", "packed_seq_params", "as in training"),
    _slime(_LOSS, Kind.takes, "loss_function", "args, batch, num_microbatches, step_global_batch_size, logits",
           "its loss"),
    _slime(_METRICS, Kind.takes, "reduce_train_step_metrics", "losses_reduced, *, calculate_per_token_loss, "
           "step_global_batch_size, cp_size, dp_with_cp_group", "its mean over all ranks"),
    *_all("megatron", "megatron/core/pipeline_parallel/schedules.py", "get_forward_backward_func", "a forward pass"),
    *_all("megatron", _STATE, "get_data_parallel_rank get_data_parallel_group get_context_parallel_world_size "
          "is_pipeline_last_stage", "this rank's place"),
]  # fmt: skip

YARN = [
    _slime(_PROVIDER, Kind.takes, "_get_model_provider_func", "args, role", "the model that slime would build"),
    *_all("megatron", "megatron/training/global_vars.py", "get_args", "its arguments"),
    *_all("megatron", _YARN, "_yarn_find_correction_range _yarn_linear_ramp_mask", "the frequencies"),
    _megatron(_YARN, Kind.says, "", "yarn_rotary_scaling_factor", "the field by which Megatron scales attention"),
    _megatron(_ATTENTION, Kind.calls, "_yarn_get_concentration_factor_from_config", "self.config", "where it does so"),
    *_all("megatron", "megatron/core/models/common/embeddings/rotary_pos_embedding.py", "RotaryEmbedding.inv_freq",
          "where the frequencies are set"),
]  # fmt: skip

FILES = [
    _megatron(_CHECKPOINTING, Kind.says, "", "no_save_optim", "a checkpoint of weights alone"),
    _megatron(_CHECKPOINTING, Kind.says, "", "latest_checkpointed_iteration.txt", "which checkpoint is whole"),
    _megatron(_CHECKPOINTING, Kind.says, "", "iter_{:07d}", "a checkpoint's folder"),
    _megatron("megatron/core/distributed/param_and_grad_buffer.py", Kind.says, "", "found NaN in local grad norm",
              "a step that diverged, before it is applied"),
]  # fmt: skip

# Only where slime runs on a CPU.
ON_A_CPU = [
    _slime(f"{_ACCELERATOR}/__init__.py", Kind.takes, "register_accelerator",
           "name, factory, is_available, priority, communication_backends", "the CPU among slime's devices"),
    *_all("slime", f"{_ACCELERATOR}/base.py", "Accelerator", "what it must answer"),
    _slime(_GROUPS, Kind.takes, "ReloadableProcessGroup._fwd", "method, *args, **kwargs", "methods handed on"),
    _slime(_PROVIDER, Kind.calls, "transformer_layer_spec", "args, config, vp_stage", "slime asks for our layers"),
    _megatron(_ATTENTION, Kind.calls, "apply_module(self.core_attention)", "query, key, value, attention_mask, "
              "attn_mask_type=attn_mask_type, attention_bias=attention_bias, packed_seq_params=packed_seq_params",
              "our attention is called"),
    *_all("megatron", "megatron/core/packed_seq_params.py", "PackedSeqParams.cu_seqlens_q PackedSeqParams.cu_seqlens_kv "
          "PackedSeqParams.max_seqlen_q PackedSeqParams.max_seqlen_kv PackedSeqParams.qkv_format", "boundaries"),
    *_all("megatron", "megatron/core/optimizer/distrib_optimizer.py", "DistributedOptimizer.sharded_state_dict "
          "DistributedOptimizer._set_main_param_and_optimizer_states DistributedOptimizer.model_param_group_index_map "
          "DistributedOptimizer._init_optimizer_states_with_dummy_values", "torch's Adam in its place"),
    *_all("megatron", "megatron/core/tensor_parallel/layers.py", "ColumnParallelLinear RowParallelLinear "
          "set_tensor_model_parallel_attributes", "layers"),
    *_all("megatron", "megatron/core/tensor_parallel/mappings.py", "gather_from_sequence_parallel_region", "layers"),
    *_all("megatron", _ATTENTION, "SelfAttention SelfAttentionSubmodules", "layers"),
    *_all("megatron", _STATE, "get_context_parallel_group", "layers"),
    *_all("megatron", "megatron/core/fusions/fused_bias_dropout.py", "get_bias_dropout_add", "layers"),
    *_all("megatron", "megatron/core/transformer/enums.py", "AttnMaskType.causal", "layers"),
    *_all("megatron", "megatron/core/transformer/identity_op.py", "IdentityOp", "layers"),
    *_all("megatron", "megatron/core/transformer/mlp.py", "MLP MLPSubmodules", "layers"),
    *_all("megatron", "megatron/core/transformer/module.py", "MegatronModule", "layers"),
    *_all("megatron", "megatron/core/transformer/moe/experts.py", "TEGroupedMLP", "layers"),
    *_all("megatron", "megatron/core/transformer/moe/moe_layer.py", "MoELayer MoESubmodules", "layers"),
    *_all("megatron", "megatron/core/transformer/moe/shared_experts.py", "SharedExpertMLP", "layers"),
    *_all("megatron", "megatron/core/transformer/spec_utils.py", "ModuleSpec", "layers"),
    *_all("megatron", "megatron/core/transformer/transformer_block.py", "TransformerBlockSubmodules "
          "get_num_layers_to_build", "layers"),
    *_all("megatron", "megatron/core/transformer/transformer_config.py", "TransformerConfig", "layers"),
    *_all("megatron", "megatron/core/transformer/transformer_layer.py", "TransformerLayer TransformerLayerSubmodules "
          "get_transformer_layer_offset", "layers"),
    *_all("megatron", "megatron/core/transformer/utils.py", "make_sharded_tensors_for_checkpoint", "layers"),
]  # fmt: skip

EVERYWHERE = (*START, *STEPS, *HELDOUT, *YARN, *FILES)
