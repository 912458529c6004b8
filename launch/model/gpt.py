"""Megatron's `GPTModel` for a recipe: its configuration, and its chunks on this rank."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from launch.model.layers import PLAIN_LAYER, block_spec
from launch.model.loss import ChunkedLossGPT
from launch.model.offload_streams import CopyStreams
from launch.model.recompute import HostStore, RecomputedLayer
from recipes.config import Dtype, Layout, Recipe, Recompute
from recipes.families import facts


def transformer_config(r: Recipe) -> TransformerConfig:
    """Build Megatron's configuration from the recipe. Only fusions that do not need Transformer Engine are on."""
    m, p = r.model, r.layout
    dtype = torch.bfloat16 if r.engine.dtype is Dtype.bf16 else torch.float32
    arguments = dict(
        num_layers=m.layers,
        hidden_size=m.hidden,
        ffn_hidden_size=m.ffn,
        num_attention_heads=m.heads,
        num_query_groups=m.kv_heads,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=m.qkv_bias,
        qk_layernorm=m.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Every weight comes from the checkpoint. perform_initialization=False would not do: Megatron marks the parameters that
        # tensor parallelism shards while it initialises them.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=True,  # Megatron's own SwiGLU in torch, which saves only its input
        apply_rope_fusion=False,
        tensor_model_parallel_size=p.tp,
        sequence_parallel=p.sp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=p.first_stage_layers,
        num_layers_in_last_pipeline_stage=p.last_stage_layers,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - variable lengths require it, even for dense models
        calculate_per_token_loss=True,
        # Batched p2p makes interleaved pipelines train wrongly on gloo, without an error if all micro-batches have the same length.
        overlap_p2p_comm=p.vpp > 1,
        batch_p2p_comm=p.vpp == 1,
        microbatch_group_size_per_vp_stage=p.pp,
    )
    if p.recompute is Recompute.selective:
        arguments |= dict(recompute_granularity="selective", recompute_modules=["mlp", "moe"])
    if m.experts and (router := facts(m.family).router):
        arguments |= dict(
            num_moe_experts=m.experts,
            moe_layer_freq=[0] * m.dense_layers + [1] * (m.layers - m.dense_layers),
            moe_router_topk=m.top_k,
            moe_ffn_hidden_size=m.expert_ffn,
            moe_shared_expert_intermediate_size=m.shared_experts * m.expert_ffn or None,
            moe_router_score_function=router.score_function,
            moe_router_enable_expert_bias=router.expert_bias,
            moe_router_bias_update_rate=0.0,  # fine-tuning keeps the released model's routing balance
            moe_router_pre_softmax=router.pre_softmax,
            moe_router_topk_scaling_factor=m.router_scaling,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_grouped_gemm=True,
        )
    return TransformerConfig(**arguments)


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_chunks(r: Recipe, config: TransformerConfig) -> list[GPTModel]:
    """Build the model's chunks on this rank: one, or `vpp` of them. `hf_names.load` sets their weights later."""
    stages: list[int | None] = list(range(r.layout.vpp)) if r.layout.vpp > 1 else [None]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    layer, chunks = layer_module(r.layout, device), []
    for stage in stages:
        placed = dict(ignore_virtual=stage is None, vp_stage=stage)
        chunk = (ChunkedLossGPT if r.layout.loss_chunk else GPTModel)(
            config,
            block_spec(config, vp_stage=stage, module=layer, kernel=r.gpu.attention),
            vocab_size=r.model.vocab,
            max_sequence_length=r.data.max_tokens,
            pre_process=parallel_state.is_pipeline_first_stage(**placed),
            post_process=parallel_state.is_pipeline_last_stage(**placed),
            share_embeddings_and_output_weights=r.model.tied,
            position_embedding_type="none",  # `PackedAttention` rotates (`rotary.py`)
            vp_stage=stage,
        )
        if r.layout.loss_chunk:
            chunk.loss_chunk = r.layout.loss_chunk
        chunks.append(chunk.to(device))
    return chunks


def layer_module(p: Layout, device: torch.device) -> ModuleSpec:
    """Return the spec of a transformer layer: Megatron's plain one, or the recomputed one for `linear` and `full`."""
    if p.recompute not in (Recompute.linear, Recompute.full):
        return PLAIN_LAYER
    host_store = HostStore(CopyStreams(device)) if p.offload else None
    return ModuleSpec(
        module=RecomputedLayer,
        params={"reuse_attention": p.recompute is Recompute.linear, "host_store": host_store},
    )
