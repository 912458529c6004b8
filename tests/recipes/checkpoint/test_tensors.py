"""Names and shapes against real checkpoints, and against transformers' own modules, built without memory."""

import math
import subprocess
import sys

import pytest

from launch.weights import safetensors_file
from recipes.checkpoint.tensors import is_mtp, links, mtp, trained
from recipes.compose.recipe import compose_recipe
from recipes.dimensions import parameters
from recipes.families.common.parts import EMBEDDING, OUTPUT
from tests.conftest import REPO

PUBLISHED = ["qwen3-4b", "qwen3-8b", "qwen3-32b", "glm4.5-air", "glm4.5"]
BIAS = "e_score_correction_bias"


def model_of(*words):
    return compose_recipe([*words, "layout.ep=1"]).model


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
def test_they_are_those_of_a_real_checkpoint(name, bases):
    m, there = model_of(f"model={name}"), {}
    for file in bases[name].glob("*.safetensors"):
        there |= {n: e.shape for n, e in safetensors_file.entries(file).items()}
    assert trained(m) | mtp(m) == there
    assert {n for n in there if is_mtp(n, m)} == mtp(m).keys()
    assert bool(mtp(m)) == (m.mtp_layers > 0)


def saved_by_transformers(config):
    """Names and shapes as `save_pretrained` writes them: an expert a tensor, whatever the modules hold."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_are_those_that_transformers_makes_of_the_published_configuration(name, reference):
    from transformers import AutoConfig

    m = model_of(f"model={name}")
    theirs = saved_by_transformers(AutoConfig.from_pretrained(reference / "hf_configs" / name))
    assert theirs[OUTPUT] == theirs[EMBEDDING]
    if m.tied:
        del theirs[OUTPUT]
    assert trained(m) == theirs


VARIED = {
    "untied": ["model=qwen3-tiny", "model.tied=false"],
    "other heads": ["model=qwen3-tiny", "model.heads=8", "model.head_dim=16"],
    "tied with experts": ["model=glm4.5-tiny", "model.tied=true"],
    "no QK norms, no biases": ["model=glm4.5-tiny", "model.qk_norm=false", "model.qkv_bias=false"],
    "two shared experts, all layers with experts": [
        "model=glm4.5-tiny", "model.shared_experts=2", "model.dense_layers=0"
    ],
    "all layers dense": ["model=glm4.5-tiny", "model.dense_layers=3"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIED)
def test_they_follow_every_choice_of_the_model(name):
    from launch.weights.tiny import hf_config

    m = model_of(*VARIED[name])
    names = ("<|endoftext|>", "<|im_end|>", "<|user|>", "<|observation|>")
    theirs = saved_by_transformers(hf_config(m, [{"content": t, "id": i} for i, t in enumerate(names)]))
    assert trained(m) == {n: s for n, s in theirs.items() if not (m.tied and n == OUTPUT)}


@pytest.mark.parametrize("name", [*PUBLISHED, "glm4.5-tiny"])
def test_their_elements_are_the_counted_parameters(name):
    m = model_of(f"model={name}")
    for tensors, count in ((trained(m), parameters(m).total), (mtp(m), parameters(m).mtp)):
        assert sum(math.prod(s) for n, s in tensors.items() if not n.endswith(BIAS)) == count


def test_a_tied_output_layer_is_the_embedding():
    assert [*links(model_of("model=qwen3-tiny"))["output_layer.weight"].hf] == [EMBEDDING]
    assert [*links(model_of("model=glm4.5-tiny"))["output_layer.weight"].hf] == [OUTPUT]


def test_a_name_without_a_layer_s_number_is_of_no_mtp_layer():
    m = model_of("model=glm4.5-tiny")
    assert [is_mtp(f"model.layers.{n}", m) for n in ("2.a", "3.a", "norm.weight", "")] == [False, True, False, False]
    assert not is_mtp("model.layers", m)


def test_they_need_neither_torch_nor_ray():
    script = "import sys, recipes.checkpoint.tensors; sys.exit(any(m in sys.modules for m in ('torch', 'ray')))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPO).returncode == 0
