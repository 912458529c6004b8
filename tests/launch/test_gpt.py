"""Rotary positions beyond the native context, against transformers. In a process of its own: megatron.core is imported
through the hook."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.checkpoint_config import exported
from tests.conftest import REPO
from tests.launch.support import recipe_of

LENGTHS = [300, 2048]  # of the two sequences in a batch; the longer one ends where this YaRN does
ROPES = {
    "yarn": ["model.native_context=512", "model.rope=yarn", "model.rope_factor=4"],
    "unscaled": ["model.native_context=512", "model.rope=unscaled"],
}
CASES = {(m, r): [f"model={m}", "layout.ep=1", *ROPES[r]] for m in ("qwen3-tiny", "glm4.5-tiny") for r in ROPES}

LOGITS = """
import json
import sys
import torch
import torch.distributed as dist
from launch.megatron import cpu
cpu.install()
from megatron.core import parallel_state, tensor_parallel
from pathlib import Path
from launch.model import hf
from launch.model.attention import packed_of
from launch.model.gpt import build_chunks, transformer_config
from launch.model.safetensors_folder import SafetensorsFolder
from recipes.compose import compose_recipe

tokens, out, cases = sys.argv[1:]
dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
sequences = torch.load(tokens)
lengths = [len(s) for s in sequences]
logits = []
for words in json.loads(cases):
    recipe = compose_recipe(words)
    chunks = build_chunks(recipe, transformer_config(recipe))
    hf.load(chunks, recipe.model, SafetensorsFolder(Path(recipe.model.checkpoint)).read)
    with torch.no_grad():
        packed = packed_of(recipe.model, lengths, torch.device("cpu"))
        all_logits = chunks[0].eval()(torch.cat(sequences)[None], None, None, packed_seq_params=packed)
    logits.append(all_logits[0].split(lengths))
torch.save(logits, out)
"""

FREQUENCIES = """
from launch.megatron import cpu
cpu.install()
import torch
from launch.model.rotary import yarn_frequencies
from recipes.compose import compose_recipe
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

for words in (
    ["model=qwen3-4b"],
    ["model=qwen3-tiny", "model.rope=yarn", "model.rope_factor=16", "model.native_context=512"],
    ["model=qwen3-tiny", "model.rope=yarn", "model.rope_factor=3.7", "model.native_context=4"],
    ["model=glm4.5-air", "model.rope=yarn", "model.rope_factor=1.1875"],
):
    m = compose_recipe([*words, "layout.ep=1"]).model
    rope = {"rope_type": "yarn", "rope_theta": m.rope_base, "factor": m.rope_factor,
            "original_max_position_embeddings": m.native_context, "partial_rotary_factor": m.rope_fraction}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](Qwen3Config(head_dim=m.head_dim, rope_parameters=rope))
    assert torch.equal(yarn_frequencies(m), theirs), words
print("ok")
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_frequencies_are_those_of_transformers_bit_for_bit():
    assert run(FREQUENCIES).strip().endswith("ok")


@pytest.fixture(scope="module")
def sequences():
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(600, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def logits(root, bases, sequences, tmp_path_factory):
    """Megatron's, by case and sequence."""
    import torch

    folder = tmp_path_factory.mktemp("logits")
    torch.save(sequences, folder / "tokens.pt")
    cases = json.dumps([[f"cluster.root={root}", *words] for words in CASES.values()])
    run(LOGITS, folder / "tokens.pt", folder / "logits.pt", cases)
    return dict(zip(CASES, torch.load(folder / "logits.pt"), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_packed_sequences_beyond_the_native_context_give_the_logits_of_transformers(
    root, tmp_path, sequences, logits, case
):
    """transformers reads what an export says. The tiny GLM rotates half of a head."""
    import torch
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
