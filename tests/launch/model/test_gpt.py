"""Rotary positions beyond the native context, against transformers."""

import json
from pathlib import Path

import pytest
import torch

from recipes.checkpoint.checkpoint_config import exported
from recipes.compose.recipe import compose_recipe
from tests.launch.one_rank import logits_of
from tests.launch.support import recipe_of

LENGTHS = [300, 2048]  # of the two sequences in a batch; the longer one ends where this YaRN does
ROPES = {
    "yarn": ["model.native_context=512", "model.rope=yarn", "model.rope_factor=4"],
    "unscaled": ["model.native_context=512", "model.rope=unscaled"],
}
CASES = {(m, r): [f"model={m}", "layout.ep=1", *ROPES[r]] for m in ("qwen3-tiny", "glm4.5-tiny") for r in ROPES}


@pytest.mark.parametrize(
    "words",
    [
        ["model=qwen3-4b"],
        ["model=qwen3-tiny", "model.rope=yarn", "model.rope_factor=16", "model.native_context=512"],
        ["model=qwen3-tiny", "model.rope=yarn", "model.rope_factor=3.7", "model.native_context=4"],
        ["model=glm4.5-air", "model.rope=yarn", "model.rope_factor=1.1875"],
    ],
)
def test_frequencies_are_those_of_transformers_bit_for_bit(megatron, words):
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from launch.model.rotary import yarn_frequencies

    m = compose_recipe([*words, "layout.ep=1"]).model
    rope = {
        "rope_type": "yarn",
        "rope_theta": m.rope_base,
        "factor": m.rope_factor,
        "original_max_position_embeddings": m.native_context,
        "partial_rotary_factor": m.rope_fraction,
    }
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](Qwen3Config(head_dim=m.head_dim, rope_parameters=rope))
    assert torch.equal(yarn_frequencies(m), theirs)


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(600, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def logits(root, bases, megatron, sequences):
    """Megatron's, by case and sequence."""
    return {case: logits_of([f"cluster.root={root}", *words], sequences) for case, words in CASES.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_packed_sequences_beyond_the_native_context_give_the_logits_of_transformers(
    root, tmp_path, sequences, logits, case
):
    """transformers reads what an export says. The tiny GLM rotates half of a head."""
    from transformers import AutoModelForCausalLM

    m = recipe_of(root, *CASES[case])[0].model
    for file in Path(m.checkpoint).glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    config = exported(m, json.loads((Path(m.checkpoint) / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for tokens, ours in zip(sequences, logits[case], strict=True):
        with torch.no_grad():
            theirs = reference(tokens[None]).logits[0]
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
def test_yarn_is_not_unscaled(logits, model):
    for yarn, unscaled in zip(logits[model, "yarn"], logits[model, "unscaled"], strict=True):
        assert (yarn - unscaled).abs().max() > 1e-3
