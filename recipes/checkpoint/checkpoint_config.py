"""Comparison of the recipe's model with a checkpoint's `config.json`, and the `config.json` of an export.

The comparison covers every field that decides what the model computes. slime accepts a wrong `num_experts_per_tok`,
`num_key_value_heads`, `vocab_size`, QK norm or rotary fraction and trains without a warning. Here each field must agree with the
recipe, and an unknown field is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from recipes import json_file
from recipes.config import Model, Mtp, Rope
from recipes.context import reach
from recipes.errors import ConfigError, Fault
from recipes.families import facts

# Names of fields: in config.json, and in the recipe.
_SAME = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "ffn", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "head_dim": "head_dim", "vocab_size": "vocab", "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position", "tie_word_embeddings": "tied", "attention_bias": "qkv_bias",
}  # fmt: skip
# Values that the engines always compute with. A checkpoint with another value cannot be trained.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_dropout": (0, None), "use_sliding_window": (False, None),
    "quantization_config": (None,), "output_router_logits": (False,),
}  # fmt: skip
_YARN = {"factor": "rope_factor", "original_max_position_embeddings": "native_context"}
# YaRN's defaults (arXiv 2309.00071), which readers take if a file lacks them. The attention factor is 0.1 ln(factor) + 1.
_FIXED_YARN: dict[str, tuple[Any, ...]] = {
    "beta_fast": (32,), "beta_slow": (1,), "truncate": (True,), "attention_factor": (None,), "mscale": (None,),
    "mscale_all_dim": (None,),
}  # fmt: skip
# The fix for a checkpoint file that differs from its published form.
AGAIN = "copy it anew, or write model.checkpoint=FOLDER of a whole checkpoint"
# Ignored fields: names, token ids and settings of libraries.
_IGNORED = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "initializer_range", "max_window_layers", "sliding_window", "_name_or_path", "model_type", "rope_theta",
    "rope_parameters", "rope_scaling", "partial_rotary_factor", "layer_types", "mlp_layer_types",
}  # fmt: skip


def check_checkpoint(m: Model) -> None:
    """Raise `ConfigError` with all differences between the recipe and the `config.json` in `model.checkpoint`."""
    path = Path(m.checkpoint) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"no config.json in '{m.checkpoint}'", "write model.checkpoint=FOLDER of a Hugging Face checkpoint"
        )
    if found := differences(m, read_config(path.parent)):
        lines = "\n".join(f"  {fault.problem}" for fault in found)
        raise ConfigError(f"'{path}' is not the model of the recipe:\n{lines}", remedy(m, found))


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the `config.json` of a Hugging Face folder. Raise `CheckpointError` if it cannot be read."""
    return json_file.read_json(checkpoint / "config.json", AGAIN)


def remedy(m: Model, found: list[Fault]) -> str:
    """Return the fix for a checkpoint with these differences.

    It is the overrides that adopt the checkpoint's values, if they remove all differences, or another checkpoint.
    """
    overrides = [fault.fix for fault in found]
    other = f"model.checkpoint=FOLDER of a {m.name}"
    return f"write {' '.join(overrides)}, or {other}" if all(overrides) else f"write {other}"


def exported(m: Model, base: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of an export: the base's, with the recipe's YaRN and without dropped MTP layers."""
    config = dict(base)
    if m.mtp is Mtp.drop and m.mtp_layers:
        config["num_nextn_predict_layers"] = 0
    if m.rope is Rope.yarn:
        field, rope = _rotary(base)
        kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        config[field] = {**kept, "rope_type": "yarn", **{name: getattr(m, option) for name, option in _YARN.items()}}
        config["max_position_embeddings"] = reach(m)
    return config


def differences(m: Model, config: dict[str, Any]) -> list[Fault]:
    """Return a fault for every field that differs, is missing or is unknown. Its fix is the override with the checkpoint's value.

    A base without scaled positions is accepted for a recipe with them, because training starts from such a base.
    """
    if m.rope is Rope.yarn and _scaled(config) and config.get("max_position_embeddings") == reach(m):
        config = config | {
            "max_position_embeddings": m.max_position
        }  # both an export's value and the release's are correct
    family = facts(m.family).config
    wanted = {name: (f"model.{option}", getattr(m, option)) for name, option in (_SAME | family.names).items()}
    fixed = _FIXED | {name: (value,) for name, value in family.constants.items()}
    found = []
    if config.get("model_type") != m.family.value:
        found.append(
            Fault(f"model_type is {config.get('model_type')!r}, the recipe's model.family is {m.family.value}")
        )
    for name, (option, value) in wanted.items():
        if name not in config:
            found.append(Fault(f"{name} is missing, the recipe says {option}={_shown(value)}"))
        elif config[name] != value:
            found.append(_unlike(name, config[name], _shown(value), option))
    found += rope_differences(m, config) + _not_allowed(config, fixed)
    kinds = config.get("layer_types") or []
    if other := [k for k in (kinds if isinstance(kinds, list) else [kinds]) if k != "full_attention"]:
        found.append(Fault(f"layer_types holds {_shown(other[0])}, only full_attention can be trained"))
    for name, only in family.fixed.items():
        if (value := getattr(m, name)) != only:
            says = f"{m.family.value} {f'always has {name}' if only else f'has no {name}'}, the recipe says {_shown(value)}"
            found.append(Fault(says, f"model.{name}={_shown(only)}"))
    found += [Fault(f"unknown field {name}") for name in sorted({*config} - {*wanted} - {*fixed} - _IGNORED)]
    return found


def rope_differences(m: Model, config: dict[str, Any]) -> list[Fault]:
    """Return the faults of the rotary positions alone; see `differences`."""
    field, rope = _rotary(config)
    if not isinstance(rope, dict):
        return [Fault(f"{field} is {rope!r}, only null or an object can be read")]
    base = rope.get("rope_theta", config.get("rope_theta"))
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    found = []
    if base != m.rope_base:
        found.append(_unlike("rope_theta", base, f"{m.rope_base:g}", "model.rope_base"))
    if fraction != m.rope_fraction:
        found.append(_unlike("partial_rotary_factor", fraction, m.rope_fraction, "model.rope_fraction"))
    known = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    if _scaled(config):
        known |= {*_YARN, *_FIXED_YARN}
        found += [Fault(f"{field}.{f.problem}", f.fix) for f in _yarn(m, rope) + _not_allowed(rope, _FIXED_YARN)]
    return found + [Fault(f"unknown field {field}.{name}") for name in sorted({*rope} - known)]


def _unlike(name: str, value: Any, expected: Any, override: str) -> Fault:
    """Return the fault of a differing field. value: the checkpoint's; an override can adopt a number or a flag only."""
    fix = f"{override}={_shown(value)}" if isinstance(value, int | float) else ""
    return Fault(f"{name} is {_shown(value)}, the recipe says {expected}", fix)


def _yarn(m: Model, rope: dict[str, Any]) -> list[Fault]:
    """Return the faults of a checkpoint's scaled positions."""
    if (kind := _type(rope)) != "yarn":
        return [Fault(f"rope_type is {kind!r}, only 'default' and 'yarn' can be trained")]
    found = []
    if m.rope is not Rope.yarn:
        found.append(Fault(f"rope_type is yarn, the recipe says {m.rope.value}", "model.rope=yarn"))
    for name, option in _YARN.items():
        value = getattr(m, option)
        if name not in rope:
            found.append(Fault(f"{name} is missing, the recipe says model.{option}={value}"))
        elif rope[name] != value:
            found.append(_unlike(name, rope[name], value, f"model.{option}"))
    return found


def yarn_reach(config: dict[str, Any]) -> int | None:
    """Return the longest sequence in tokens that a config's YaRN allows, or None without YaRN."""
    rope = _rotary(config)[1]
    return round(rope["factor"] * rope["original_max_position_embeddings"]) if _scaled(config) else None


def _rotary(config: dict[str, Any]) -> tuple[str, Any]:
    """Return the field of the rotary settings that transformers reads, and its content.

    Newer files have all settings in `rope_parameters`. Older files have the scaling in `rope_scaling` and the rest at the top level.
    """
    field = "rope_parameters" if config.get("rope_parameters") and not config.get("rope_scaling") else "rope_scaling"
    return field, config.get(field) or {}


def _type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaled(config: dict[str, Any]) -> bool:
    rope = _rotary(config)[1]
    return isinstance(rope, dict) and _type(rope) != "default"


def _not_allowed(config: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> list[Fault]:
    return [
        Fault(f"{name} is {config[name]!r}, only {allowed[0]!r} can be trained")
        for name, allowed in fixed.items()
        if name in config and config[name] not in allowed
    ]


def _shown(value: Any) -> str:
    return json.dumps(value)
