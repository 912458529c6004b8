"""Every layout trains as one rank does, and one rank starts where transformers is."""

import functools
import json
from dataclasses import fields
from pathlib import Path

import pytest

from launch.bench import parity
from launch.run.run_plan import Plan
from launch.weights.safetensors_folder import SafetensorsFolder
from tests.launch import faulty
from tests.launch.support import POOL, OneByOne, ranks_of

# Those that faults showed in before.
QUICK = ["Qwen3 CP2", "Qwen3 TP2 SP", "Qwen3 PP2 VPP2", "GLM TP2 SP", "GLM EP2", "GLM TP2 SP EP2"]


# One rank, before the others, for whose number the pool starts its processes anew.
@pytest.mark.run
@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
def test_the_first_loss_and_its_gradients_are_those_of_transformers(root, tmp_path, model):
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    words = [f"model={model}", "cluster.gpus_per_node=1", "layout=data_parallel", "optim.clip_grad=1e9"]
    with ranks_of(root, *words) as (plan, ranks):
        ours = ranks.call("train_step", 0)[0]
        ranks.call("write_gradients", str(tmp_path))
    gradients = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    reference = AutoModelForCausalLM.from_pretrained(plan.recipe.model.checkpoint, dtype=torch.float32)
    total, count = 0.0, 0
    for micro_batch in plan.schedule.step(0).ranks[0]:
        for sequence in micro_batch:
            tokens = torch.tensor(plan.data.tokens(sequence))[None].long()
            losses = F.cross_entropy(reference(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
            of_turns = torch.cat([losses[start - 1 : end - 1] for start, end in plan.data.spans(sequence)])
            of_turns.sum().backward()
            total += of_turns.double().sum().item()
            count += len(of_turns)
    assert ours["supervised_tokens"] == count
    assert ours["loss"] == pytest.approx(total / count, abs=1e-5)
    seen = 0
    for name, parameter in reference.named_parameters():
        for theirs, gradient in by_expert(name, parameter.grad):
            seen += 1
            expected = gradient / count
            assert (gradients[theirs] - expected).norm() <= 1e-4 * expected.norm() + 1e-9, theirs
    assert seen > 30


def by_expert(name, gradient):
    """transformers holds a layer's experts in one tensor, a checkpoint each in its own."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, gradient)]
    stem, part = name.rsplit(".", 1)
    found = []
    for e, one in enumerate(gradient):
        if part == "down_proj":
            found.append((f"{stem}.{e}.down_proj.weight", one))
        else:
            gate, up = one.chunk(2)
            found += [(f"{stem}.{e}.gate_proj.weight", gate), (f"{stem}.{e}.up_proj.weight", up)]
    return found


@pytest.fixture(scope="module")
def compare(root, on_one_rank):
    """The difference from one rank of a layout, given by its name, or of a run in it."""

    def compare(name, run=None):
        run = run or right(name)
        one = on_one_rank[parity.LAYOUTS[name][0][0]]
        return parity.difference(run, run, one, one)

    @functools.cache
    def right(name):
        return parity.train_layout(POOL, root, [*parity.words_of(name), parity.EPS])

    return compare


@pytest.mark.run
@pytest.mark.parametrize("name", QUICK)
def test_a_layout_follows_one_rank(compare, name):
    found = compare(name)
    assert found.within(parity.FP32), found


@pytest.mark.slow
def test_experts_reduced_as_megatron_marks_them_train_wrongly(root, compare, monkeypatch):
    """Without expert parallelism: over the ranks that hold the same attention, here one."""
    name = "GLM TP2 SP"
    assert compare(name).within(parity.FP32)
    monkeypatch.setattr("launch.megatron.ranks.Worker", faulty.UnreducedExperts)
    found = compare(name, parity.train_layout(POOL, root, [*parity.words_of(name), parity.EPS]))
    assert found.loss > 1e-3, found
    assert found.gradient[0] > 0.3 and ".experts." in found.gradient[1], found


@pytest.mark.slow
def test_interleaved_pipelines_with_batched_messages_train_wrongly(root, compare, monkeypatch):
    """Where all micro-batches have one length; where not, what arrives does not fit and raises."""
    name = "Qwen3 PP2 VPP2"
    found = {}
    for worker in (faulty.EqualLengths, faulty.BatchedP2P):
        monkeypatch.setattr("launch.megatron.ranks.Worker", worker)
        found[worker] = compare(name, parity.train_layout(POOL, root, [*parity.words_of(name), parity.EPS]))
    assert found[faulty.EqualLengths].within(parity.FP32), found
    assert found[faulty.BatchedP2P].loss > 1e-3, found


@pytest.mark.parametrize("model", [parity.QWEN, parity.GLM], ids=["qwen3", "glm"])
@pytest.mark.slow
def test_packed_trains_as_one_by_one(root, on_one_rank, monkeypatch, model):
    """The reference packs each step into one micro-batch; here each sequence is one."""
    shapes = []

    def split(recipe, data, heldout):
        plan = Plan(recipe, data, heldout)
        packed = plan.schedule
        shapes.extend([len(b) for b in packed.step(n).ranks[0]] for n in range(parity.STEPS))
        given = {f.name: getattr(packed, f.name) for f in fields(packed) if f.init}
        object.__setattr__(plan, "schedule", OneByOne(**given))
        return plan

    monkeypatch.setattr(parity, "Plan", split)
    run, one = parity.one_rank(POOL, root, model, parity.EPS), on_one_rank[model[0]]
    found = parity.difference(run, run, one, one)
    assert shapes == [[4]] * parity.STEPS
    assert found.within(parity.FP32), found


@pytest.mark.slow
def test_every_layout_follows_one_rank(root):
    for name, _, found, limits in parity.compared(POOL, root, parity.LAYOUTS):
        assert found.within(limits), (name, found)


@pytest.mark.run
@pytest.mark.parametrize("name", ["Qwen3 CP2", "GLM TP2 SP EP2"])
def test_bf16_in_a_layout_stays_in_its_band_beside_fp32_on_one_rank(root, compare, name):
    found = compare(name, parity.train_layout(POOL, root, [*parity.words_of(name), parity.EPS, "engine.dtype=bf16"]))
    assert found.within(parity.BF16_LAYOUTS[name]), found
    assert not found.within(parity.FP32), "bf16 it was"


@pytest.mark.slow
def test_every_bf16_row_stays_in_its_band(root):
    for name, _, found, limits in parity.compared_bf16(POOL, root, parity.BF16_LAYOUTS):
        assert found.within(limits), (name, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name", "limits"),
    [
        (faulty.UnreducedExperts, "GLM TP2 SP", parity.BF16_GLM),
        (faulty.ShiftedLabels, "GLM smallest micro-batches", parity.BF16_GLM),
        (faulty.ShiftedLabels, "Qwen3 smallest micro-batches", parity.BF16_QWEN),
    ],
)
def test_the_bf16_band_lets_no_fault_through(root, compare, monkeypatch, fault, name, limits):
    words = [*parity.words_of(name), parity.EPS, "engine.dtype=bf16"]
    right = compare(name, parity.train_layout(POOL, root, words))
    assert right.within(limits), right
    monkeypatch.setattr("launch.megatron.ranks.Worker", fault)
    wrong = compare(name, parity.train_layout(POOL, root, words))
    assert not wrong.within(limits), wrong


def test_what_differs_is_found():
    """A run against itself with one thing changed at a time."""
    import torch

    def run(loss=1.0, norm=1.0, gradient=1.0, weight=1.0):
        return parity.Run([loss], [norm], {"g": torch.tensor([gradient, 1.0])}, {"w": torch.tensor([weight, 1.0])})

    fp32 = parity.FP32
    assert parity.difference(run(), run(), run(), run()).within(fp32)
    for changed in (run(loss=1.00002), run(norm=1.0002), run(gradient=1.001), run(weight=1.001)):
        assert not parity.difference(changed, run(), run(), run()).within(fp32)
    assert not parity.difference(run(), run(loss=1.00002), run(), run()).within(fp32)
    with pytest.raises(KeyError):
        parity.difference(run(), run(), parity.Run([1.0], [1.0], {}, {}), run())


@pytest.mark.run
def test_training_leaves_the_routers_expert_bias_bit_for_bit(root):
    import torch

    words = [*parity.words_of("GLM EP2"), "optim.lr=1e-2"]
    weights = parity.train_layout(POOL, root, words).weights
    base = SafetensorsFolder(root / "models" / "glm4.5-tiny-untied")
    names = [n for n in base.files if n.endswith("e_score_correction_bias") and "layers.4" not in n]
    assert len(names) == 3
    for name in names:
        assert torch.equal(weights[name].view(torch.int32), base.read(name).view(torch.int32))
    assert not torch.equal(weights["model.norm.weight"], base.read("model.norm.weight"))


@pytest.mark.slow
def test_export_before_training_gives_the_base_back_bit_for_bit(root, tmp_path):
    """Through tensor and expert parallelism and the pipeline; the router's expert bias and the MTP layer included."""
    import torch

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
