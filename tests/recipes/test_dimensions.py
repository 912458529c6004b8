"""Counts against transformers' own modules, built without memory."""

import pytest

from recipes.compose.recipe import compose_recipe
from recipes.dimensions import flops, parameters

MODELS = ["qwen3-tiny", "glm4.5-tiny", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "glm4.5-air", "glm4.5"]


def model_of(name):
    return compose_recipe([f"model={name}", "layout.ep=1"]).model


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name):
    import torch
    from transformers import AutoModelForCausalLM

    from launch.weights.tiny import hf_config

    m = model_of(name)
    names = ("<|endoftext|>", "<|im_end|>", "<|user|>", "<|observation|>")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(m, [{"content": t, "id": i} for i, t in enumerate(names)]))
    theirs = {n: p.numel() for n, p in model.named_parameters()}
    mine = parameters(m)
    assert mine.total == sum(theirs.values())
    assert mine.experts == sum(n for name, n in theirs.items() if ".experts." in name)
    assert mine.attention == sum(n for name, n in theirs.items() if ".self_attn." in name)
    assert mine.router == sum(n for name, n in theirs.items() if ".mlp.gate.weight" in name)


@pytest.mark.parametrize("name", ["glm4.5-tiny"])
def test_mtp_parameters_are_those_of_the_checkpoint(name, bases):
    from safetensors import safe_open

    with safe_open(bases[name] / "mtp-3.safetensors", "pt") as file:
        names = [n for n in file.keys() if not n.endswith("e_score_correction_bias")]  # noqa: SIM118  # not iterable
        count = sum(file.get_tensor(n).numel() for n in names)
    assert parameters(model_of(name)).mtp == count


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("glm4.5", 352.8e9, 33.6e9), ("glm4.5-air", 106.9e9, 13.4e9), ("qwen3-32b", 32.76e9, 32.76e9)],
)
def test_published_sizes(name, total, active):
    p = parameters(model_of(name))
    assert p.total == pytest.approx(total, rel=1e-3) and p.active == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("name", ["qwen3-tiny", "glm4.5-tiny"])
def test_flops_are_what_torch_counts(name):
    """Matrix products of a real forward pass; attention is counted by its causal pairs, half of the full square."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from launch.weights.tiny import hf_config

    m = model_of(name)
    names = ("<|endoftext|>", "<|im_end|>", "<|user|>", "<|observation|>")
    config = hf_config(m, [{"content": t, "id": i} for i, t in enumerate(names)])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    length = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length).unsqueeze(0))
    f = flops(m)
    square = f.a_pair * length**2
    # The rotary angles' outer product, which transformers takes as a matrix product, is no work of the model's.
    rotary = length * round(m.head_dim * m.rope_fraction)
    assert abs(counter.get_total_flops() - (f.a_token * length + square)) <= 2 * rotary


def test_packed_sequences_do_not_see_each_other():
    f = flops(model_of("qwen3-32b"))
    assert f.batch([1000, 1000]) == 2 * f.sequence(1000) < f.sequence(2000)
    assert f.sequence(3) == 3 * f.a_token + 6 * f.a_pair
