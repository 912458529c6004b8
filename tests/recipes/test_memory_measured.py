"""Weights, gradients, optimizer state and activations against real Megatron ranks (`measure.py`)."""

import json
import subprocess
import sys

import pytest

from recipes.activations import activations
from recipes.compose import compose_recipe
from recipes.layout import world_size
from recipes.partition import buffers, stages
from tests.conftest import REPO

QWEN, GLM = ["model=qwen3-tiny", "engine.dtype=bf16"], ["model=glm4.5-tiny", "engine.dtype=bf16"]
# Shapes that nothing here was fitted to.
WIDE = ["model.hidden=160", "model.ffn=480", "model.heads=8", "model.head_dim=32", "model.layers=3", "model.vocab=1536"]
MANY = [
    "model.hidden=64",
    "model.experts=16",
    "model.top_k=5",
    "model.expert_ffn=56",
    "model.heads=6",
    "model.head_dim=16",
]
CASES = [
    [*QWEN],
    [*QWEN, "layout.tp=2", "layout.sp=true"],
    [*QWEN, "layout.pp=2", "layout.first_stage_layers=1"],
    [*QWEN, "layout.tp=2", "layout.pp=2", "layout.vpp=2", "cluster.gpus_per_node=4"],
    [*GLM],
    [*GLM, "layout.tp=2", "layout.sp=true", "layout.cp=2", "layout.ep=4", "cluster.gpus_per_node=4"],
    [*GLM, "model.layers=4", "layout.pp=2", "cluster.gpus_per_node=4"],
    [*QWEN, *WIDE, "layout.cp=2"],
    [*GLM, *MANY, "layout.tp=2", "layout.sp=true"],
    [*QWEN, "layout.recompute=full", "cluster.gpus_per_node=1"],
    [*QWEN, *WIDE, "layout.recompute=selective", "cluster.gpus_per_node=1"],
    [*GLM, "layout.recompute=selective"],
]
LENGTHS = [256, 1024, 2304]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "found.json"
    cases = [{"words": words, "ranks": world_size(compose_recipe(words)), "lengths": LENGTHS} for words in CASES]
    command = [sys.executable, "-m", "tests.recipes.measure", str(out)]
    done = subprocess.run(command, cwd=REPO, input=json.dumps(cases), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def mean(numbers):
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(words[2:]) or words[0] for words in CASES])
def test_a_rank_holds_what_the_formulas_say(measured, case):
    r = compose_recipe(CASES[case])
    ranks = [f for f in measured if f["case"] == case]
    for stage, chunks in enumerate(stages(r.model, r.layout)):
        here = [f for f in ranks if f["stage"] == stage]
        held = buffers(r.model, r.layout, chunks, world_size(r))
        elements = sum(b.elements for b in held)
        assert {f["weights"] for f in here} == {2 * elements}
        assert {f["gradients"] for f in here} == {4 * elements}
        # fp32 weights and two moments; padding makes the ranks' shares unlike, their mean is exact.
        assert mean([f["optimizer"] for f in here]) == pytest.approx(
            12 * sum(b.parameters / b.ranks for b in held), abs=0.1
        )
        a = activations(r, imbalance=1.0)
        for i, length in enumerate(LENGTHS):
            tokens = length // r.layout.cp
            expected = tokens * a.chunk(chunks[0], r.layout.recompute)
            saved = mean([f["saved"][i]["all"] - f["saved"][i]["loss"] for f in here])
            assert saved == pytest.approx(expected, rel=0.05), (stage, length, saved / expected)
            if chunks[0].output:
                assert mean([f["saved"][i]["loss"] for f in here]) == pytest.approx(tokens * a.softmax, rel=0.05)
