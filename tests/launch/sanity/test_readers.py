"""Who reads an export computes the same: transformers, SGLang and the embedded trainer, token by token in fp32. vLLM is not
installed: it reads architectures and tensor names that are transformers', and these are compared."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data_prep.pack.dataset import Dataset
from launch.serving.server import running
from recipes.checkpoint.tensors import is_mtp
from recipes.config import Recipe
from recipes.paths import run_folder
from tests.launch.one_rank import logits_of
from tests.launch.support import exported, ranks_of

pytestmark = pytest.mark.slow

MODELS = ["qwen3-tiny", "glm4.5-tiny"]
STEPS = 4
TOLERANCE = 1e-5  # of a token's log-probability; seen: 9.5e-7 at most, of 604 and 563 tokens


@dataclass(frozen=True)
class Trained:
    recipe: Recipe
    hf: Path
    heldout: Dataset
    loss: float  # held-out, by the ranks that trained

    def transformers(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.hf, output_loading_info=True, dtype=torch.float32)


@pytest.fixture(scope="module", params=MODELS)
def trained(root, request):
    words = [
        f"model={request.param}", f"run=readers-{request.param}", "optim.lr=1e-3", "optim.warmup_steps=1",
        "cluster.gpus_per_node=1", "layout=data_parallel",
    ]  # fmt: skip
    with ranks_of(root, *words) as (plan, ranks):
        hf = exported(plan, ranks, run_folder(plan.recipe) / "hf", STEPS)
        return Trained(plan.recipe, hf, plan.heldout, ranks.call("heldout_loss")[0])


def logprobs(logits, tokens):
    """Of every token but the first."""
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]


def by_megatron(trained, tokens):
    words = [f"model={trained.recipe.model.name}", "layout.ep=1", f"model.checkpoint={trained.hf}"]
    return logits_of(words, [tokens])[0]


def by_sglang(trained, tokens, log):
    with running(trained.recipe, trained.hf, log, True) as client:
        answer = client.post(
            "/generate",
            {"input_ids": tokens.tolist(), "sampling_params": {"temperature": 0, "max_new_tokens": 0},
             "return_logprob": True, "logprob_start_len": 0},
        )  # fmt: skip
    first, *rest = answer["meta_info"]["input_token_logprobs"]
    assert first[0] is None and [token for _, token, _ in rest] == tokens[1:].tolist()
    return torch.tensor([logprob for logprob, _, _ in rest])


def test_transformers_loads_it_strictly_and_its_loss_is_the_trainer_s(trained):
    model, info = trained.transformers()
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info.get("error_msgs")
    # transformers has no MTP layers: those alone are beyond what it knows.
    assert all(is_mtp(name, trained.recipe.model) for name in info["unexpected_keys"])
    assert bool(trained.recipe.model.mtp_layers) >= bool(info["unexpected_keys"])
    total, count = 0.0, 0
    for sequence in range(len(trained.heldout.ids)):
        tokens = torch.tensor(trained.heldout.tokens(sequence)).long()
        with torch.no_grad():
            of_tokens = logprobs(model(tokens[None]).logits[0], tokens)
        for start, end in trained.heldout.spans(sequence):
            total -= of_tokens[start - 1 : end - 1].double().sum().item()
            count += end - start
    print(f"held-out loss: {total / count:.9f} by transformers, {trained.loss:.9f} by the trainer")
    assert math.isclose(total / count, trained.loss, abs_tol=TOLERANCE)


def test_sglang_and_the_trainer_s_model_give_transformers_log_probabilities(trained, megatron, tmp_path):
    longest = max(range(len(trained.heldout.ids)), key=lambda s: trained.heldout.lengths[s])
    tokens = torch.tensor(trained.heldout.tokens(longest)).long()
    with torch.no_grad():
        logits = trained.transformers()[0](tokens[None]).logits[0]
    ours = by_megatron(trained, tokens)
    theirs = by_sglang(trained, tokens, tmp_path / "log")
    expected = logprobs(logits, tokens)
    figures = {
        "logits, Megatron": (ours - logits).abs().max().item(),
        "log-probabilities, Megatron": (logprobs(ours, tokens) - expected).abs().max().item(),
        "log-probabilities, SGLang": (theirs - expected).abs().max().item(),
        "log-probabilities, SGLang to Megatron": (theirs - logprobs(ours, tokens)).abs().max().item(),
    }
    print(trained.recipe.model.name, len(tokens), "tokens", {name: f"{value:.1e}" for name, value in figures.items()})
    assert all(value <= TOLERANCE for value in figures.values()), figures


def test_architecture_and_tensor_names_are_those_that_transformers_writes(trained, tmp_path):
    model, _ = trained.transformers()
    model.save_pretrained(tmp_path)
    written = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written |= {name: tensors.get_slice(name).get_shape() for name in list(tensors.keys())}
    index = json.loads((trained.hf / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        if not is_mtp(name, trained.recipe.model):
            with safe_open(trained.hf / file, "pt") as tensors:
                found[name] = tensors.get_slice(name).get_shape()
    assert found == written
    said, theirs = (json.loads((folder / "config.json").read_text()) for folder in (trained.hf, tmp_path))
    assert said["architectures"] == theirs["architectures"] == [type(model).__name__]
    assert said["model_type"] == theirs["model_type"]
