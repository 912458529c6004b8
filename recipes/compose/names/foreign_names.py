"""Option names of other frameworks: slime, Megatron-LM, transformers and TRL, axolotl, LLaMA-Factory, ms-swift, verl.

To add a name, add a line to `FOREIGN`. `tests/recipes/compose/names/test_foreign_names.py` composes the overrides of every entry.
"""

from typing import NamedTuple


class Foreign(NamedTuple):
    """One or more option names of other frameworks with the same meaning, and the override that replaces them here."""

    names: str  # separated by spaces; `_` also matches `-`; with a dot if the last part alone means something else
    # The equivalent overrides; `{}` stands for the value. A dictionary gives them by value: "true" and "false" match any spelling
    # of a flag, "<1" a share, and "" every other value.
    write: str | dict[str, str] = ""
    note: str = ""  # the difference, or why there is no such option
    value: str = "true"  # an example of its value, for the tests


_STEPS = "the number of steps follows from optim.epochs and optim.batch_size: write optim.epochs=N; `make plan` shows the steps"
_MICRO = (
    "a step takes optim.batch_size trajectories over all ranks, in micro-batches that are packed up to layout.max_tokens_per_gpu: "
    "write optim.batch_size=N"
)
_PACKED = "sequences are always packed, up to layout.max_tokens_per_gpu, and each attends to itself alone: leave it out"
_TRAJECTORIES = "counted in trajectories, over all ranks"
_KERNELS = "the engine chooses attention and its kernels: leave it out"
_SHARDED = (
    "the optimizer's state is always sharded over the data-parallel ranks: write layout=auto for all other choices"
)
_FULL = "every weight is trained, without adapters or quantization: leave it out"
_LEARNED = "assistant turns alone are learned: write data.turns=all or last_segment, and weight: 0 at a message to leave it out"
_LONGER = "a longer trajectory is rejected, or cut with data.too_long=split"
_RESUME = "the same command goes on from its run's last whole checkpoint by itself: leave it out"
_TRACKED = "TensorBoard is always written: write engine.wandb=PROJECT for Weights & Biases too, on slime"
_FORM = "data=NAME says its form, one of those in hydra_conf/data"
_HELDOUT = "held-out trajectories are a file of their own: write data.heldout=FILE"
_SCHEDULE = "the one schedule is a warm-up and a cosine down to optim.lr x optim.min_lr_ratio"
_VIRTUAL = "layout.vpp counts the stages of a rank, not their layers: write layout.vpp=N"
_RECOMPUTED = "layout.recompute says it all: write layout.recompute=selective, linear or full"
_RANKS = "ranks are nodes x GPUs of a node: write cluster.nodes=N cluster.gpus_per_node=N"
_EVALUATED = (
    "the held-out loss comes every so many steps, before the first and after the last: write optim.eval_steps=N"
)
_BF16 = {"true": "engine.dtype=bf16", "false": "engine.dtype=fp32"}
_DTYPES = dict.fromkeys(("bf16", "bfloat16"), "engine.dtype=bf16") | dict.fromkeys(
    ("fp32", "float32"), "engine.dtype=fp32"
)
_RECOMPUTE = {"true": "layout.recompute=full", "false": "layout.recompute=none"}
_OFFLOAD = {"true": "layout.optimizer_state=offloaded", "false": "layout.optimizer_state=resident"}

FOREIGN = (
    # Learning rate and optimizer
    Foreign("learning_rate lr", "optim.lr={}", value="1e-5"),
    Foreign(
        "min_lr",
        note="optim.min_lr_ratio is the last rate as a share of optim.lr: for 1e-6 of optim.lr=1e-5 write optim.min_lr_ratio=0.1",
        value="1e-6",
    ),
    Foreign("min_lr_ratio cosine_min_lr_ratio", "optim.min_lr_ratio={}", value="0.1"),
    Foreign("warmup_ratio lr_warmup_fraction lr_warmup_steps_ratio", "optim.warmup_fraction={}", value="0.1"),
    Foreign(
        "warmup_steps lr_warmup_steps lr_warmup_iters num_warmup_steps",
        {"<1": "optim.warmup_fraction={}", "": "optim.warmup_steps={}"},
        value="10",
    ),
    Foreign("lr_warmup_init", note="the warm-up begins at optim.lr / (optim.warmup_steps + 1): leave it out"),
    Foreign(
        "lr_scheduler_type lr_scheduler lr_decay_style warmup_style",
        {"constant": "optim.min_lr_ratio=1 optim.warmup_steps=0", "constant_with_warmup": "optim.min_lr_ratio=1"},
        _SCHEDULE,
        "cosine",
    ),
    Foreign("lr_scheduler_kwargs lr_decay_iters lr_decay_steps lr_decay_samples", note=_SCHEDULE, value="1000"),
    Foreign("weight_decay wd", "optim.weight_decay={}", value="0.01"),
    Foreign("adam_beta1", "optim.beta1={}", value="0.9"),
    Foreign("adam_beta2", "optim.beta2={}", value="0.95"),
    Foreign("betas", note="there are two options: write optim.beta1=0.9 optim.beta2=0.98", value="[0.9,0.95]"),
    Foreign("adam_epsilon adam_eps", "optim.eps={}", value="1e-8"),
    Foreign("max_grad_norm clip_grad gradient_clipping grad_clip", "optim.clip_grad={}", value="1.0"),
    Foreign(
        "optimizer optim_args",
        note="the optimizer is AdamW, with optim.weight_decay, optim.beta1 and optim.beta2: leave it out",
        value="adamw_torch",
    ),
    Foreign(
        "loss_type loss_scale label_smoothing_factor neftune_noise_alpha",
        note="the loss is plain cross-entropy: leave it out",
    ),
    # Epochs, steps, batches
    Foreign("num_train_epochs num_epochs num_epoch total_epochs max_epochs", "optim.epochs={}", value="3.0"),
    Foreign(
        "max_steps train_iters num_train_steps total_training_steps num_rollout train_samples num_steps", note=_STEPS
    ),
    Foreign(
        "global_batch_size train_batch_size rollout_batch_size batch_size total_batch_size bs",
        "optim.batch_size={}",
        _TRAJECTORIES,
        "16",
    ),
    Foreign(
        "per_device_train_batch_size per_device_eval_batch_size micro_batch_size micro_batch_size_per_gpu "
        "gradient_accumulation_steps eval_batch_size auto_find_batch_size rampup_batch_size",
        note=_MICRO,
        value="2",
    ),
    Foreign("max_token_len_per_gpu max_tokens_per_gpu", "layout.max_tokens_per_gpu={}", value="9216"),
    Foreign(
        "packing sample_packing neat_packing eval_packing eval_sample_packing padding_free use_remove_padding "
        "use_dynamic_batch_size use_dynamic_bsz balance_data balance_by_flops group_by_length batch_flattening "
        "pad_to_sequence_len variable_seq_lengths packing_strategy",
        note=_PACKED,
    ),
    Foreign("log_probs_chunk_size", {"-1": "layout.loss_chunk=null", "": "layout.loss_chunk={}"}, value="1024"),
    Foreign("shuffle_dataset rollout_shuffle dataset_shuffle", note="every epoch is shuffled, by seed: leave it out"),
    Foreign("data_seed random_seed rollout_seed", "seed={}", value="42"),
    # Lengths
    Foreign(
        "max_seq_length max_seq_len sequence_len sequence_length seq_length seq_len cutoff_len max_length max_model_len "
        "model_max_length packing_length",
        "data.max_tokens={}",
        _LONGER,
        "32768",
    ),
    Foreign(
        "truncation_strategy truncation_mode truncation excess_length_strategy",
        {"split": "data.too_long=split", "delete": "data.too_long=reject", "error": "data.too_long=reject"},
        "nothing is truncated: write data.too_long=split or data.too_long=reject",
        "split",
    ),
    Foreign(
        "rope_scaling rope_scaling_factor rotary_scaling_factor use_rope_scaling rope_type",
        note="positions are scaled by YaRN alone: write model.rope=yarn model.rope_factor=X, or model.rope=unscaled",
        value="linear",
    ),
    Foreign("rope_theta rotary_base", "model.rope_base={}", value="1000000"),
    # Parallelism and memory
    Foreign(
        "tensor_model_parallel_size tensor_parallel_size tensor_parallel model_parallel_size tp tp_size mp",
        "layout.tp={}",
        value="2",
    ),
    Foreign("pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel pp_size", "layout.pp={}", value="2"),
    Foreign(
        "context_parallel_size context_parallel cp_size sequence_parallel_size sequence_parallel_degree "
        "ulysses_sequence_parallel_size",
        "layout.cp={}",
        value="2",
    ),
    Foreign("expert_model_parallel_size expert_parallel_size expert_parallel ep_size", "layout.ep={}", value="8"),
    Foreign("expert_tensor_parallel_size", "layout.etp={}", value="1"),
    Foreign("data_parallel_size dp_size", "layout.dp={}", value="8"),
    Foreign("sequence_parallel", "layout.sp={}"),
    Foreign("num_virtual_stages_per_pipeline_rank virtual_pipeline_model_parallel_size", "layout.vpp={}", value="2"),
    Foreign(
        "num_layers_per_virtual_pipeline_stage",
        note=_VIRTUAL,
    ),
    Foreign("decoder_first_pipeline_num_layers", "layout.first_stage_layers={}", value="11"),
    Foreign("decoder_last_pipeline_num_layers", "layout.last_stage_layers={}", value="12"),
    Foreign(
        "recompute_granularity",
        {"full": "layout.recompute=full", "selective": "layout.recompute=selective"},
        "layout.recompute=selective repeats the MLPs and the experts",
        "full",
    ),
    Foreign(
        "recompute_method recompute_num_layers recompute_modules",
        note=_RECOMPUTED,
    ),
    Foreign(
        "gradient_checkpointing enable_gradient_checkpointing activation_checkpointing recompute_activations "
        "checkpoint_activations",
        _RECOMPUTE,
        value="True",
    ),
    Foreign(
        "gradient_checkpointing_kwargs",
        note=_RECOMPUTED,
        value="{}",
    ),
    Foreign("activation_offloading enable_activation_offload", "layout.offload={}"),
    Foreign("optimizer_cpu_offload optimizer_offload offload_optimizer", _OFFLOAD),
    Foreign(
        "use_precision_aware_optimizer",
        {"true": "layout.optimizer_state=precision_aware", "false": "layout.optimizer_state=resident"},
    ),
    Foreign(
        "deepspeed fsdp fsdp_config fsdp_version zero_stage use_distributed_optimizer use_megatron_fsdp use_torch_fsdp2 "
        "deepspeed_config overlap_grad_reduce overlap_param_gather strategy",
        note=_SHARDED,
        value="zero3.json",
    ),
    # Precision and kernels
    Foreign("bf16 bfloat16 pure_bf16", _BF16),
    Foreign(
        "dtype torch_dtype model_dtype mixed_precision params_dtype",
        _DTYPES,
        "precision is bf16 or fp32",
        "bfloat16",
    ),
    Foreign("fp16 float16 fp8 fp8_format tf32", note="precision is bf16 or fp32: write engine.dtype=bf16"),
    Foreign(
        "attn_implementation attn_impl flash_attn flash_attention use_flash_attn attention_backend sdp_attention "
        "xformers_attention transformer_impl",
        note=_KERNELS,
        value="flash_attention_2",
    ),
    Foreign(
        "use_liger_kernel enable_liger_kernel use_liger torch_compile use_unsloth use_fused_kernels", note=_KERNELS
    ),
    # Machines
    Foreign(
        "num_gpus gpus num_gpus_per_node n_gpus_per_node nproc_per_node actor_num_gpus_per_node",
        "cluster.gpus_per_node={}",
        value="8",
    ),
    Foreign("nnodes num_nodes actor_num_nodes num_machines", "cluster.nodes={}", value="2"),
    Foreign(
        "num_processes world_size",
        note=_RANKS,
        value="16",
    ),
    Foreign("ddp_timeout", "engine.timeout={}", value="1800"),
    Foreign("distributed_timeout_minutes", note="the longest wait is in seconds: write engine.timeout=N", value="10"),
    # Checkpoints and runs
    Foreign("save_steps save_interval save_freq", "engine.save_steps={}", value="50"),
    Foreign("save_total_limit max_ckpt_to_keep", "engine.keep_last={}", value="2"),
    Foreign("save_strategy", note="a save comes every so many steps and after the last: write engine.save_steps=N"),
    Foreign("eval_steps eval_interval test_freq", "optim.eval_steps={}", value="10"),
    Foreign(
        "eval_strategy evaluation_strategy do_eval",
        note=_EVALUATED,
    ),
    Foreign("do_train", note="`make train` trains: leave it out"),
    Foreign(
        "output_dir save_dir default_local_dir save_hf",
        "cluster.root={}",
        "a run is in the folder runs/NAME of it, and run=NAME names the run",
        "/data/out",
    ),
    Foreign(
        "run_name experiment_name wandb_name wandb_exp_name wandb_group tb_experiment_name", "run={}", value="first"
    ),
    Foreign("wandb_project project_name", "engine.wandb={}", "on slime", "limi"),
    Foreign("report_to use_wandb use_tensorboard logging_dir tensorboard_dir logger", note=_TRACKED, value="wandb"),
    Foreign(
        "logging_steps log_interval logging_strategy logging_first_step",
        note="every step is logged: leave it out",
        value="10",
    ),
    Foreign(
        "load resume_from_checkpoint resume_mode resume_from_path resume auto_resume_from_checkpoints ckpt_step "
        "overwrite_output_dir finetune",
        note=_RESUME,
        value="runs/first",
    ),
    Foreign("push_to_hub hub_model_id hub_strategy", note="nothing is uploaded: leave it out"),
    # Models and data
    Foreign(
        "model_name_or_path base_model hf_checkpoint model_name model_id model_path model.path partial_pretrain "
        "pretrained_model_name_or_path pretrained_checkpoint ref_load base",
        "model={}",
        value="Qwen/Qwen3-32B",
    ),
    Foreign(
        "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_model tokenizer_type",
        note="the tokenizer is the one in model.checkpoint: leave it out",
    ),
    Foreign(
        "chat_template template chat_template_path", note="the template is the one in model.checkpoint: leave it out"
    ),
    Foreign("trust_remote_code", note="no code of a checkpoint is run: leave it out"),
    Foreign(
        "dataset datasets dataset_name dataset_path train_file train_files train_data train_dataset prompt_data "
        "train_data_path data_path data_files",
        "data.path={}",
        _FORM,
        "/data/train.jsonl",
    ),
    Foreign(
        "val_file val_files val_data val_dataset validation_file eval_dataset eval_prompt_data valid_data_path "
        "test_data_path test_datasets",
        "data.heldout={}",
        _FORM,
        "/data/heldout.jsonl",
    ),
    Foreign("val_size val_set_size split_dataset_ratio eval_split", note=_HELDOUT, value="0.1"),
    Foreign(
        "dataset_num_proc preprocessing_num_workers dataset_processes num_workers dataloader_num_workers",
        "data.workers={}",
        "processes that pack the data",
        "8",
    ),
    Foreign("dataset_prepared_path data_cache_path tokenized_path", "data.out={}", value="/data/packed"),
    Foreign(
        "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss loss_mask_type roles_to_train mask_history",
        note=_LEARNED,
    ),
    Foreign(
        "enable_thinking", note="reasoning is learned, shown or dropped: write data.thinking=supervise, context or drop"
    ),
    # How a command is given
    Foreign("multirun sweep", note="a command is one run: give it again for the next value, with run=NAME of its own"),
    Foreign(
        "config config_name config_path config_file yaml_cfg",
        note="a choice is a word, as model=qwen3-4b, and the files of hydra_conf are what can be chosen",
        value="sft.yaml",
    ),
    # Adapters and quantization
    Foreign(
        "lora_r lora_rank lora_alpha lora_dropout lora_target lora_target_modules lora_target_linear target_modules "
        "modules_to_save use_dora use_rslora adapter adapters peft use_peft qlora load_in_4bit load_in_8bit "
        "quantization_bit quant_bits finetuning_type train_type tuner_type freeze_parameters",
        note=_FULL,
        value="16",
    ),
)
