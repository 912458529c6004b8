"""The recipe's model against a checkpoint's `config.json`: every field that decides what the model computes.

slime lets a wrong `num_experts_per_tok`, `num_key_value_heads`, `vocab_size`, QK norm or rotary fraction pass, and trains on
without a word. Here each must be what the recipe says, and a field that nobody here knows is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from recipes.config import Family, Model
from recipes.errors import ConfigError

# Field by field: the name in config.json and in the recipe.
_SAME = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "ffn", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "vocab_size": "vocab", "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position", "tie_word_embeddings": "tied", "attention_bias": "qkv_bias",
}  # fmt: skip
_SAME_MOE = {
    "n_routed_experts": "experts", "num_experts_per_tok": "top_k", "moe_intermediate_size": "expert_ffn",
    "n_shared_experts": "shared_experts", "first_k_dense_replace": "dense_layers",
    "routed_scaling_factor": "router_scaling", "num_nextn_predict_layers": "mtp_layers", "use_qk_norm": "qk_norm",
}  # fmt: skip
# What the engines compute whatever the recipe says; a checkpoint that wants it otherwise cannot be trained.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_dropout": (0, None), "use_sliding_window": (False, None), "rope_scaling": (None,),
    "quantization_config": (None,), "norm_topk_prob": (True,), "n_group": (1,), "topk_group": (1,),
    "output_router_logits": (False,),
}  # fmt: skip
# Names, ids and habits of libraries.
_IGNORED = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "initializer_range", "max_window_layers", "sliding_window", "_name_or_path", "model_type", "rope_theta",
    "rope_parameters", "partial_rotary_factor", "layer_types", "mlp_layer_types",
}  # fmt: skip


def check_checkpoint(m: Model) -> None:
    """Raises `ConfigError` with every difference between the recipe and the `config.json` in `model.checkpoint`."""
    path = Path(m.checkpoint) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"no config.json in '{m.checkpoint}'; write model.checkpoint=FOLDER of a Hugging Face checkpoint"
        )
    if found := differences(m, json.loads(path.read_text(encoding="utf-8"))):
        raise ConfigError(f"'{path}' is not the model of the recipe:\n" + "\n".join(f"  {line}" for line in found))


def differences(m: Model, config: dict[str, Any]) -> list[str]:
    """A line for every field that differs, is missing, or is not known; with the override that mends it where one can."""
    wanted = {theirs: (f"model.{ours}", getattr(m, ours)) for theirs, ours in _SAME.items()}
    if m.family is Family.glm4_moe:
        wanted |= {theirs: (f"model.{ours}", getattr(m, ours)) for theirs, ours in _SAME_MOE.items()}
    found = []
    if config.get("model_type") != m.family.value:
        found.append(f"model_type is {config.get('model_type')!r}, the recipe's model.family is {m.family.value}")
    for name, (ours, value) in wanted.items():
        if name not in config:
            found.append(f"{name} is missing; the recipe says {ours}={_shown(value)}")
        elif config[name] != value:
            found.append(
                f"{name} is {_shown(config[name])}, the recipe says {_shown(value)}; write {ours}={_shown(config[name])}"
            )
    found += _rope(m, config)
    for name, allowed in _FIXED.items():
        if name in config and config[name] not in allowed:
            found.append(f"{name} is {config[name]!r}, and only {allowed[0]!r} can be trained")
    if {*(config.get("layer_types") or [])} - {"full_attention"}:
        found.append(f"layer_types holds {sorted({*config['layer_types']})}, and only full_attention can be trained")
    if m.family is Family.qwen3 and not m.qk_norm:
        found.append("qwen3 always has QK norms; write model.qk_norm=true")
    found += [f"unknown field {name}" for name in sorted({*config} - {*wanted} - {*_FIXED} - _IGNORED)]
    return found


def _rope(m: Model, config: dict[str, Any]) -> list[str]:
    """Rotary settings, which older files have at the top and newer ones under `rope_parameters`."""
    rope = config.get("rope_parameters") or {}
    base = rope.get("rope_theta", config.get("rope_theta"))
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    found = []
    if base != m.rope_base:
        found.append(f"rope_theta is {base}, the recipe says {m.rope_base:g}; write model.rope_base={base}")
    if fraction != m.rope_fraction:
        found.append(
            f"partial_rotary_factor is {fraction}, the recipe says {m.rope_fraction}; write model.rope_fraction={fraction}"
        )
    if rope.get("rope_type", "default") != "default":
        found.append(f"rope_type is {rope['rope_type']!r}, and only 'default' can be trained")
    return found


def _shown(value: Any) -> str:
    return json.dumps(value)
