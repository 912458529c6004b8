"""slime's argument list: every value the recipe's, every flag known, and both accepted by the real slime and Megatron-LM."""

import json
from types import SimpleNamespace

import pytest

from launch.slime import arguments as module
from launch.slime.arguments import arguments
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from recipes.layout import data_parallel
from recipes.schedule.learning_rate import learning_rate
from tests.launch.slime.support import checked, in_megatron, planned, rendered

MODELS = ["glm4.5", "glm4.5-air", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"]
RELEASED = ["glm4.5", "glm4.5-air", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"]
CASES = [*((m, ()) for m in MODELS), *((m, ("experiment=released", "cluster=h100x64")) for m in RELEASED)]


def values(argv):
    """{flag: its values}"""
    found = {}
    for word in argv:
        if word.startswith("--"):
            assert word not in found, f"{word} twice"
            found[word] = []
            last = word
        else:
            found[last].append(word)
    return found


@pytest.mark.parametrize(("model", "words"), CASES, ids=str)
def test_every_flag_is_given_once_and_known(model, words):
    found = values(rendered(f"model={model}", *words))
    recipe, steps = planned(f"model={model}", *words)
    assert set(found) <= module._FLAGS
    assert found["--num-rollout"] == [str(steps)]
    assert found["--global-batch-size"] == found["--rollout-batch-size"] == [str(data_parallel(recipe))]
    assert ("--custom-model-provider-path" in found) == (recipe.model.rope.value == "yarn")
    assert ("--no-rope-fusion" in found) == (recipe.model.rope.value == "yarn"), "the fused one has no attention factor"
    assert ("--num-experts" in found) == bool(recipe.model.experts)


def test_an_unknown_flag_fails_the_render(monkeypatch):
    monkeypatch.setattr(module, "_FLAGS", module._FLAGS - {"--swiglu"})
    with pytest.raises(AssertionError, match="--swiglu"):
        rendered("model=qwen3-4b")


def test_a_further_flag_is_passed_on_and_checked():
    recipe, steps = planned("model=qwen3-4b")

    def given(**args):
        recipe.engine.args = args
        try:
            return arguments(recipe, steps, "")
        finally:
            recipe.engine.args = {}

    assert given(tp_comm_overlap="true")[-1] == "--tp-comm-overlap"
    assert given(**{"manual-gc-interval": "5"})[-2:] == ["--manual-gc-interval", "5"]
    with pytest.raises(ConfigError, match="the nearest is --tp-comm-overlap"):
        given(tp_com_overlap="true")
    with pytest.raises(ConfigError, match="slime has no --learning-rate; here it is 'optim.lr': write optim.lr=1e-5"):
        given(learning_rate="1e-5")
    with pytest.raises(
        ConfigError, match=r"slime has no --nothing-like-it; leave it out; launch/slime/flags.txt lists all flags"
    ):
        given(nothing_like_it="true")
    with pytest.raises(ConfigError, match="the recipe sets --lr; here it is 'optim.lr': write optim.lr=1"):
        given(lr="1")
    with pytest.raises(ConfigError, match="the recipe sets .*; here it is 'optim.warmup_steps'"):
        given(lr_warmup_iters="5")
    with pytest.raises(ConfigError, match="the recipe sets .*; change it in the recipe"):
        given(num_layers="5")


def test_pass_through_is_typed_on_the_command_line():
    recipe = compose_recipe(["model=qwen3-4b", "engine.args.manual_gc_interval=5"])
    assert recipe.engine.args == {"manual_gc_interval": "5"}
    with pytest.raises(ConfigError, match="is a flag of slime's"):
        compose_recipe(["model=qwen3-tiny", "engine.args.manual_gc_interval=5"])


def rates(steps, batch, given):
    """Megatron's of every step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "lr_mult": 1.0, "wd_mult": 1.0}])
    same = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": steps, "wd_incr_style": "constant"}
    scheduler = OptimizerParamScheduler(optimizer, **given, **same, lr_decay_style="cosine")
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        scheduler.step(batch)


@pytest.mark.parametrize("warmup", ["optim.warmup_steps=3", "optim.warmup_steps=0", "optim.warmup_fraction=0.9"])
@pytest.mark.parametrize("epochs", [1, 4])
def test_megatrons_rates_are_the_plans(megatron, warmup, epochs):
    """Megatron's own scheduler, made and stepped as slime does it: by the global batch, after each optimizer step."""
    recipe, steps = planned("model=qwen3-4b", "layout.cp=2", f"optim.epochs={epochs}", warmup)
    found = values(arguments(recipe, steps, ""))

    def number(flag, default=0.0):
        return float(found.get(flag, [default])[0])

    batch = data_parallel(recipe)
    decay = number("--lr-decay-iters") * batch
    by_fraction = "--lr-warmup-fraction" in found
    given = {
        "init_lr": number("--lr-warmup-init"),
        "max_lr": number("--lr"),
        "min_lr": number("--min-lr"),
        "lr_warmup_steps": number("--lr-warmup-fraction") * decay
        if by_fraction
        else number("--lr-warmup-iters") * batch,
        "lr_decay_steps": decay,
    }
    assert list(rates(steps, batch, given)) == pytest.approx(
        [learning_rate(recipe.optim, s, steps) for s in range(steps)], rel=1e-9
    )


# Qwen/Qwen3-14B's config.json where it differs from Qwen3-8B's; the reference folder has the latter.
OF_14B = {
    "num_hidden_layers": 40,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 40,
    "max_window_layers": 40,
}


def config_of(reference, model, tmp_path):
    """A folder with the model's config.json."""
    if model != "qwen3-14b":
        return reference / "hf_configs" / model
    other = json.loads((reference / "hf_configs" / "qwen3-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(other | OF_14B))
    return tmp_path


@pytest.mark.contract
@pytest.mark.parametrize(("model", "words"), CASES, ids=str)
def test_slime_and_megatron_accept_the_list(reference, tmp_path, model, words):
    found = checked(rendered(f"model={model}", *words), config_of(reference, model, tmp_path))
    assert found["ok"], found
    assert found["unknown"] == []


def wanted(config):
    """Megatron's fields, by hand from a checkpoint's config.json."""
    rope = config.get("rope_parameters") or {}
    found = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "add_qkv_bias": config["attention_bias"],
        "qk_layernorm": config.get("use_qk_norm", True),  # Qwen3 always has it
        "rotary_base": rope.get("rope_theta") or config["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor") or config.get("partial_rotary_factor", 1.0),
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "hidden_dropout": 0.0,
        "num_moe_experts": config.get("n_routed_experts"),
        "params_dtype": "torch.bfloat16",
        "bf16": True,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": True,
        "mtp_num_layers": None,
    }
    if found["num_moe_experts"]:
        dense = config["first_k_dense_replace"]
        found |= {
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
            "moe_layer_freq": [0] * dense + [1] * (config["num_hidden_layers"] - dense),
            "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
            "moe_router_num_groups": None if config["n_group"] == 1 else config["n_group"],
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_z_loss_coeff": None,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": True,
        }
    return found


@pytest.mark.contract
@pytest.mark.parametrize("model", MODELS)
def test_slimes_transformer_config_is_that_of_the_checkpoints_config(reference, tmp_path, model):
    folder = config_of(reference, model, tmp_path)
    found = in_megatron(rendered(f"model={model}"), folder)["config"]
    expected = wanted(json.loads((folder / "config.json").read_text()))
    assert {name: found[name] for name in expected} == expected
    recipe, _ = planned(f"model={model}")
    p = recipe.layout
    degrees = {
        "tensor_model_parallel_size": p.tp, "pipeline_model_parallel_size": p.pp, "context_parallel_size": p.cp,
        "expert_model_parallel_size": p.ep, "expert_tensor_parallel_size": p.etp, "sequence_parallel": p.sp,
        "virtual_pipeline_model_parallel_size": p.vpp if p.vpp > 1 else None,
    }  # fmt: skip
    if not recipe.model.experts:
        degrees["expert_tensor_parallel_size"] = p.tp  # Megatron's default, of no effect
    assert {name: found[name] for name in degrees} == degrees


@pytest.mark.contract
def test_the_flags_are_those_of_the_pinned_commits(reference):
    found = in_megatron(rendered("model=qwen3-4b"), reference / "hf_configs" / "qwen3-4b")["flags"]
    assert sorted(module._FLAGS) == found
