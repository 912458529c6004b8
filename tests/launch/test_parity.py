"""Every layout trains as one rank does, and one rank starts where transformers is."""

import json
from pathlib import Path

import pytest

from launch.plan import Plan
from tests.launch.support import ranks_of, recipe_of

STEPS = 5
LAYOUTS = {
    "qwen3-tiny": [
        ["cluster.gpus_per_node=2"],
        ["layout.tp=2"],
        ["layout.tp=2", "layout.sp=true"],
        ["layout.pp=2"],
        ["layout.cp=2"],
        ["layout.pp=2", "layout.last_stage_layers=1"],
        ["cluster.gpus_per_node=1", "layout.recompute=selective"],
    ],
    "glm4.5-tiny": [
        ["cluster.gpus_per_node=2"],
        ["layout=data_parallel"],
        ["layout.pp=2", "layout.ep=1"],
        ["layout.recompute=selective"],
    ],
}
ONE_RANK = ["cluster.gpus_per_node=1", "layout=data_parallel"]


def steps(root, model, words):
    # 3 layers of the tiny GLM do not divide by a pipeline of 2; it is the same shape with one more for everybody.
    deeper = ["model.layers=4", f"model.checkpoint={root}/models/glm4.5-four"] if model == "glm4.5-tiny" else []
    with ranks_of(root, f"model={model}", *deeper, *words) as (_, ranks):
        return [ranks.call("train_step", step)[0] for step in range(STEPS)]


@pytest.fixture(scope="module")
def one_rank(root):
    return {model: steps(root, model, ONE_RANK) for model in LAYOUTS}


@pytest.mark.parametrize(("model", "words"), [(m, words) for m, layouts in LAYOUTS.items() for words in layouts])
def test_a_layout_follows_one_rank(root, one_rank, model, words):
    for mine, reference in zip(steps(root, model, words), one_rank[model], strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], abs=1e-4)
        assert mine["tokens"] == reference["tokens"]
        assert mine["supervised_tokens"] == reference["supervised_tokens"]


@pytest.mark.parametrize("model", LAYOUTS)
def test_the_first_loss_is_that_of_transformers(root, model):
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    with ranks_of(root, f"model={model}", *ONE_RANK) as (_, ranks):
        ours = ranks.call("train_step", 0)[0]
    recipe, data, heldout = recipe_of(root, f"model={model}", *ONE_RANK)
    plan = Plan(recipe, data, heldout)
    reference = AutoModelForCausalLM.from_pretrained(recipe.model.checkpoint, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for micro_batch in plan.schedule.step(0).ranks[0]:
        for sequence in micro_batch:
            tokens = torch.tensor(data.tokens(sequence))[None].long()
            with torch.no_grad():
                losses = F.cross_entropy(reference(tokens).logits[0, :-1], tokens[0, 1:], reduction="none").double()
            for start, end in data.spans(sequence):
                total += losses[start - 1 : end - 1].sum().item()
                count += end - start
    assert ours["supervised_tokens"] == count
    assert ours["loss"] == pytest.approx(total / count, abs=1e-5)


def test_export_before_training_gives_the_base_back_bit_for_bit(root, tmp_path):
    """Through tensor and expert parallelism and the pipeline; the router's expert bias and the MTP layer included."""
    import torch

    from launch.model.safetensors_folder import SafetensorsFolder

    words = ["model=glm4.5-tiny", "layout.tp=2", "layout.sp=true"]
    with ranks_of(root, *words) as (plan, ranks):
        written = {}
        for part in ranks.call("export", str(tmp_path)):
            written |= part
    base = SafetensorsFolder(Path(plan.recipe.model.checkpoint))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": written}))
    export = SafetensorsFolder(tmp_path)
    assert set(export.files) == set(base.files)
    for name in base.files:
        a, b = base.read(name), export.read(name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name
