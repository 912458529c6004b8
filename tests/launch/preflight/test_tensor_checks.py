"""A checkpoint's names, shapes and dtypes against the recipe's model: every kind of fault by name, with what fixes it."""

import math
import subprocess
import sys

import pytest

from launch.preflight import tensor_checks as check
from launch.weights.safetensors_file import Entry
from recipes.checkpoint.tensors import mtp, trained
from recipes.compose.recipe import compose_recipe
from recipes.families.common.parts import EMBEDDING, OUTPUT
from tests.conftest import REPO

QWEN, UNTIED, GLM = (
    compose_recipe(["model.checkpoint=F", *words]).model
    for words in (
        ["model=qwen3-tiny"], ["model=qwen3-tiny", "model.tied=false"], ["model=glm4.5-tiny", "layout.ep=1"]
    )
)  # fmt: skip
AGAIN = "download F again, or write model.checkpoint=FOLDER of a whole {}"


def entry(shape, dtype="BF16"):
    return Entry(dtype, tuple(shape), 0, 2 * math.prod(shape))


def whole(m):
    """As released: bf16, the router's bias in fp32."""
    return {n: entry(s, "F32" if n.endswith("_bias") else "BF16") for n, s in (trained(m) | mtp(m)).items()}


def problems(m, there):
    return [fault.problem for fault in check.faults(m, there)]


def only(m, there):
    (fault,) = check.faults(m, there)
    return fault


def without(there, *parts):
    return {n: e for n, e in there.items() if not any(part in n for part in parts)}


@pytest.mark.parametrize("m", [QWEN, UNTIED, GLM], ids=["tied", "untied", "experts"])
def test_a_whole_checkpoint_has_no_fault_and_nothing_odd(m):
    assert not [*check.faults(m, whole(m))] and not [*check.oddities(m, whole(m))]
    assert check.wanted(m) == {n: e.shape for n, e in whole(m).items()}


def test_every_tensor_is_missed_and_every_shape_is_held():
    for m in (QWEN, UNTIED, GLM):
        there = whole(m)
        for name, e in there.items():
            optional = "layers.3.embed_tokens" in name or "shared_head.head" in name
            assert bool(problems(m, without(there, name))) != optional, name
            assert any(name in p for p in problems(m, there | {name: entry([*e.shape[:-1], 7])})), name
            assert any(name in p for p in problems(m, there | {name: entry(e.shape, "F8_E4M3")})), name


def test_an_untied_model_without_an_output_layer():
    """As Qwen3-VL-Embedding-8B: config.json says untied, and no file has it."""
    fault = only(UNTIED, without(whole(UNTIED), OUTPUT))
    assert fault.problem.startswith(
        "lm_head.weight is missing, but the recipe's model is untied (model.tied=false): slime would"
    )
    assert fault.fix == (
        f"{AGAIN.format('qwen3-tiny')}; if it was trained tied, set tie_word_embeddings to true in config.json and write "
        "model.tied=true"
    )


def test_a_tied_model_with_an_output_layer_of_its_own_is_odd_and_no_fault():
    """As trainers save it that hand a state to save_pretrained, and as some small Qwen3 are published."""
    there = whole(QWEN) | {OUTPUT: entry((QWEN.vocab, QWEN.hidden))}
    assert problems(QWEN, there) == []
    (odd,) = check.oddities(QWEN, there)
    assert odd.problem.startswith(
        "lm_head.weight is present, but the recipe's model is tied: training, Megatron, slime and SGLang"
    )
    assert "write model.tied=false" in odd.fix
    of_other_rows = there | {OUTPUT: entry((800, QWEN.hidden))}
    assert only(QWEN, of_other_rows).problem == "lm_head.weight is of 800 rows, but model.vocab=768"


def test_transformers_takes_the_output_layer_of_a_tied_model_where_it_is_not_the_embedding(bases, tmp_path):
    """What the oddity says of it."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    (tmp_path / "config.json").write_bytes((bases["qwen3-tiny"] / "config.json").read_bytes())
    held = load_file(bases["qwen3-tiny"] / "model.safetensors")
    for factor in (1.0, 2.0):
        save_file(held | {OUTPUT: held[EMBEDDING] * factor}, tmp_path / "model.safetensors", {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(model.lm_head.weight, held[EMBEDDING] * factor)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "", "module.model.", "language_model.model.", "_orig_mod.model."]
)
@pytest.mark.parametrize("m", [QWEN, UNTIED, GLM], ids=["tied", "untied", "experts"])
def test_names_that_begin_otherwise_are_one_fault(m, prefix):
    around = prefix.removesuffix("model.") if prefix.endswith(".model.") else ""

    def renamed(name):
        return around + name if name == OUTPUT else prefix + name.removeprefix("model.")

    there = {renamed(n): e for n, e in whole(m).items()}
    fault = only(m, there)
    assert fault.problem.startswith(
        f"names begin with '{prefix}', but the model's begin with 'model.': {prefix}embed_tokens.weight"
    )
    assert ("without its output layer" in fault.problem) == (prefix == "")
    assert "or write model.checkpoint=FOLDER of a" in fault.fix
    lost = next(n for n in there if "q_proj.weight" in n)
    assert [p.split(": ")[-1] for p in problems(m, without(there, lost))][1:] == [
        "model.layers.0.self_attn.q_proj.weight"
    ], "what is missing besides is said too"


def test_a_vision_model_s_towers_are_no_part():
    there = {n.replace("model.", "model.language_model."): e for n, e in whole(QWEN).items()}
    there |= {f"model.visual.blocks.{i}.attn.proj.weight": entry((8, 8)) for i in range(3)}
    assert problems(QWEN, there)[1:] == [
        "3 tensors that no part of qwen3-tiny uses: model.visual.blocks.0.attn.proj.weight and 2 like it"
    ]


EXPERT = "model.layers.2.mlp.experts.3."


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([EXPERT], "expert 3 of layer 2 is missing; a layer has 4 experts"),
        ([EXPERT, "model.layers.1.mlp.experts.0."], "expert 0 of layer 1 and 1 more are missing; a layer has 4 experts"),
        ([f"{EXPERT}up_proj"], f"missing, 1 of 107 tensors: {EXPERT}up_proj.weight"),
        (["1.mlp.shared_experts.", "2.mlp.shared_experts."],
         "missing, 6 of 107 tensors: model.layers.1.mlp.shared_experts.gate_proj.weight and 1 like it, "
         "model.layers.1.mlp.shared_experts.up_proj.weight and 1 like it, "
         "model.layers.1.mlp.shared_experts.down_proj.weight and 1 like it"),
        (["model.layers.1.mlp.gate.e_score"], "missing, 1 of 107 tensors: model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)  # fmt: skip
def test_what_is_missing_of_the_experts(parts, says):
    fault = only(GLM, without(whole(GLM), *parts))
    assert (fault.problem, fault.fix) == (says, AGAIN.format("glm4.5-tiny"))


def test_multi_token_prediction_layers_follow_the_recipe():
    bare = without(whole(GLM), "layers.3.")
    fault = only(GLM, bare)
    count = len(mtp(GLM))
    assert fault.problem.startswith(
        f"{count - 2} of the {count} tensors of multi-token-prediction layers, which the export copies, are missing: model.layers.3."
    )
    assert fault.fix == "write model.mtp=drop"
    dropped = compose_recipe(["model=glm4.5-tiny", "layout.ep=1", "model.mtp=drop"]).model
    assert problems(dropped, bare) == problems(dropped, whole(GLM)) == []
    none = compose_recipe(["model=glm4.5-tiny", "layout.ep=1", "model.mtp_layers=0", "model.checkpoint=F"]).model
    fault = only(none, whole(GLM))
    assert fault.problem.endswith("more are of multi-token-prediction layers, but model.mtp_layers=0")
    assert fault.fix.startswith("write model.mtp=drop; or write model.mtp_layers=N")
    none.mtp = dropped.mtp
    assert problems(none, whole(GLM)) == []


def test_layers_beyond_the_model_s_are_no_mtp_layers():
    shorter = compose_recipe(["model=qwen3-tiny", "model.layers=3", "model.mtp=drop", "model.checkpoint=F"]).model
    fault = only(shorter, whole(QWEN))
    assert fault.problem == "model.layers.3.input_layernorm.weight and 10 more are of layers beyond model.layers=3"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "model.layers.0.self_attn.o_proj.bias",
            "1 tensor that no part of qwen3-tiny uses: model.layers.0.self_attn.o_proj.bias",
        ),
        ("model.rotary_emb.inv_freq", "1 tensor that no part of qwen3-tiny uses: model.rotary_emb.inv_freq"),
        ("score.weight", "1 tensor that no part of qwen3-tiny uses: score.weight"),
    ],
)
def test_what_no_part_takes_is_named(name, says):
    fault = only(QWEN, whole(QWEN) | {name: entry((3,))})
    assert (fault.problem, fault.fix) == (says, AGAIN.format("qwen3-tiny"))


def test_many_kinds_are_counted():
    extra = {f"{kind}.{n}.x": entry((3,)) for kind in "abcdef" for n in range(2)}
    assert only(QWEN, whole(QWEN) | extra).problem == (
        "12 tensors that no part of qwen3-tiny uses: a.0.x and 1 like it, b.0.x and 1 like it, c.0.x and 1 like it, d.0.x and 1 like "
        "it, and 2 more kinds"
    )


OTHER_KINDS = {
    "fp8": ("_scale_inv", lambda n: {n: "F8_E4M3", f"{n}_scale_inv": "F32"}, "quantised"),
    "GPTQ": (
        "qweight",
        lambda n: {n.replace("weight", s): "I32" for s in ("qweight", "qzeros", "scales", "g_idx")},
        "quantised",
    ),
    "AWQ": ("qweight", lambda n: {n.replace("weight", s): "I32" for s in ("qweight", "qzeros", "scales")}, "quantised"),
    "compressed-tensors": ("weight_packed", lambda n: {f"{n}_packed": "I32", f"{n}_scale": "BF16"}, "quantised"),
    "bitsandbytes": ("absmax", lambda n: {n: "U8", f"{n}.absmax": "F32", f"{n}.quant_map": "F32"}, "quantised"),
    "LLM.int8": ("SCB", lambda n: {n: "I8", n.replace("weight", "SCB"): "F32"}, "quantised"),
    "LoRA": ("lora_A", lambda n: {n.replace("weight", f"lora_{c}.weight"): "F32" for c in "AB"}, "LoRA adapter"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_checkpoint_of_another_kind_is_one_fault(kind):
    names, parts, says = OTHER_KINDS[kind]
    there = without(whole(QWEN), "_proj")
    for name in whole(QWEN):
        if "_proj" in name:
            there |= {n: entry((4, 4), dtype) for n, dtype in parts(name).items()}
    fault = only(QWEN, there)
    assert names in fault.problem and says in fault.problem
    assert "write model.checkpoint=FOLDER of the" in fault.fix


def test_an_adapter_under_peft_s_own_names():
    there = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": entry((8, 96)) for i in range(4)}
    assert only(QWEN, there).problem == (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight and 3 more are of a LoRA adapter, not of a model"
    )


def test_fused_experts_are_named():
    there = without(whole(GLM), "layers.1.mlp.experts.", "layers.2.mlp.experts.")
    for layer in (1, 2):
        begin = f"model.layers.{layer}.mlp.experts."
        there |= {f"{begin}gate_up_proj": entry((4, 192, 96)), f"{begin}down_proj": entry((4, 96, 96))}
    fault = only(GLM, there)
    assert fault.problem.startswith("model.layers.1.mlp.experts.gate_up_proj and 3 more are of all experts in one")
    assert "gate_up_proj[e] holds the gate above the up projection" in fault.fix


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F64"])
def test_dtypes_that_cannot_be_trained(dtype):
    there = {n: entry(e.shape, dtype if "q_proj" in n else "BF16") for n, e in whole(QWEN).items()}
    fault = only(QWEN, there)
    assert (
        fault.problem
        == f"model.layers.0.self_attn.q_proj.weight and 3 more are {dtype}; only BF16, F16, F32 can be trained"
    )
    assert (
        fault.fix
        == "write model.checkpoint=FOLDER of the qwen3-tiny in BF16 or F16 or F32, from which it was quantised"
    )


def test_a_mix_of_dtypes_and_a_rounded_bias_are_odd():
    there = whole(QWEN) | {EMBEDDING: entry((QWEN.vocab, QWEN.hidden), "F32")}
    assert problems(QWEN, there) == []
    (odd,) = check.oddities(QWEN, there)
    assert odd.problem.startswith(f"tensors of several dtypes: 45 BF16, 1 F32, e.g. {EMBEDDING}")
    rounded = {n: entry(e.shape) for n, e in whole(GLM).items()}
    (odd,) = check.oddities(GLM, rounded)
    assert odd.problem.startswith(
        "model.layers.1.mlp.gate.e_score_correction_bias and 2 more are BF16, but released in F32"
    )


def test_an_embedding_that_was_resized_names_the_override():
    there = whole(UNTIED) | {n: entry((800, UNTIED.hidden)) for n in (EMBEDDING, OUTPUT)}
    fault = only(UNTIED, there)
    assert fault.problem == f"{EMBEDDING} and 1 more are of 800 rows, but model.vocab=768"
    assert fault.fix.startswith("write model.vocab=800, with vocab_size 800 in config.json, or")


def test_other_shapes_are_shown_a_kind_each():
    there = {n: entry((64, 96)) if "gate_proj" in n else e for n, e in whole(QWEN).items()}
    assert only(QWEN, there).problem == (
        "4 tensors of another shape: model.layers.0.mlp.gate_proj.weight is [64, 96], not [192, 96]"
    )


def test_it_needs_neither_torch_nor_megatron():
    script = "import sys, launch.preflight.tensor_checks; sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'ray')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO).returncode == 0
