"""Megatron's layer spec built from plain torch modules, with Transformer Engine's parameter names.

These names make checkpoints of this engine and of slime compatible, and let one mapping to Hugging Face names
(`weights/hf_names.py`) serve both. Examples: `linear_qkv.layer_norm_weight`, `linear_fc1.layer_norm_weight`,
`experts.linear_fc1.weight{i}`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from launch.model.attention import PackedAttention, RotatedOnce
from launch.model.compiled import fused
from recipes.config import AttentionKernel

if not hasattr(moe_utils, "te_general_gemm"):
    # megatron-core 0.16.1 binds this name only with Transformer Engine, but the router reads it without it too (moe_utils.py:1192).
    moe_utils.te_general_gemm = None

PLAIN_LAYER = ModuleSpec(module=TransformerLayer)  # saves its activations for the backward pass


def _norm_weight(config: TransformerConfig, size: int) -> Parameter:
    weight = Parameter(torch.ones(size, dtype=config.params_dtype))
    # Under sequence parallelism each rank normalises its part of the tokens. The mark makes Megatron sum this gradient over tp.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class _Normalise(torch.autograd.Function):
    """Root mean square norm that saves its input and one number per row for the backward pass, as Transformer Engine's does.

    Without a fused kernel, torch's own norm saves two fp32 copies of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_normalised_backward(gradient, *ctx.saved_tensors), None


@fused
def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised x, and the factor of each row."""
    scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x * scale * weight).to(x.dtype), scale


@fused
def _normalised_backward(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    unit = x * scale
    inner = gradient * weight
    of_x = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    of_weight = (gradient * unit).flatten(0, -2).sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in fp32. It supports sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = _norm_weight(config, hidden_size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normalise.apply(x, self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """A norm and a column-parallel linear layer in one module, as in Transformer Engine."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(_Normalise.apply(x, self.layer_norm_weight, self.eps), *args, **kwargs)


class GroupedLinear(torch.nn.Module):
    """One linear layer per local expert, with parameters `weight0`, `weight1`, …

    axis: the dimension that expert tensor parallelism shards (0 column, 1 row). The token dispatcher does all communication.
    """

    axis: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        self.groups, self.count = pg_collection, num_gemms
        shape = [output_size, input_size]
        shape[self.axis] //= pg_collection.expt_tp.size()
        for i in range(num_gemms):
            weight = Parameter(torch.empty(*shape, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(weight, True, self.axis, 1)
            # allreduce=False makes Megatron reduce the gradient over the ranks that hold the same experts. It is needed if these
            # are not the ranks that hold the same attention: reduced over those, losses drift by 2e-3 to 4e-3 without an error.
            same_sharding = config.expert_tensor_parallel_size == config.tensor_model_parallel_size
            same_ranks = config.expert_model_parallel_size == 1 and same_sharding
            weight.allreduce = same_ranks  # type: ignore[attr-defined]
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, tokens_per_expert: list[int]) -> tuple[Tensor, None]:
        """Apply each expert's layer to its tokens: x [tokens sorted by expert, in] -> [tokens, out]."""
        parts = x.split(tokens_per_expert)
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)]), None

    def backward_dw(self) -> None:
        """Do nothing: the backward pass has already computed the weight gradients."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return all experts under one key, with the expert's global number as the leading dimension (as TEGroupedLinear)."""
        assert metadata is not None
        first, total = self.groups.ep.rank() * self.count, self.groups.ep.size() * self.count
        out: dict[str, Any] = {}
        for i in range(self.count):
            shard = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{i}")},
                prefix,
                {"weight": self.axis},
                (*sharded_offsets, (len(sharded_offsets), first + i, total)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )[f"{prefix}weight"]
            shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
            out[f"{prefix}weight{i}"] = shard
        return out


class ColumnGroupedLinear(GroupedLinear):
    axis = 0


class RowGroupedLinear(GroupedLinear):
    axis = 1


def block_spec(
    config: TransformerConfig,
    *,
    vp_stage: int | None,
    module: ModuleSpec = PLAIN_LAYER,
    kernel: AttentionKernel = AttentionKernel.varlen,
) -> TransformerBlockSubmodules:
    """Return the layer specs of this pipeline stage, for both engines. `moe_layer_freq` says which layers have experts.

    module: the class of a layer, with its own parameters. kernel: attention's on a GPU.
    """
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=RotatedOnce,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=ModuleSpec(module=PackedAttention, params={"kernel": kernel}),
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    plain_mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(
        module=TEGroupedMLP, submodules=MLPSubmodules(linear_fc1=ColumnGroupedLinear, linear_fc2=RowGroupedLinear)
    )
    shared = ModuleSpec(module=SharedExpertMLP, submodules=plain_mlp)
    dense_mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=NormColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    expert_mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))

    def layer(is_expert: bool) -> ModuleSpec:
        return ModuleSpec(
            module=module.module,
            params=module.params,
            submodules=TransformerLayerSubmodules(
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=RMSNorm if is_expert else IdentityOp,
                mlp=expert_mlp if is_expert else dense_mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )

    kinds = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer(bool(kind)) for kind in kinds[first : first + count]], layer_norm=RMSNorm
    )
