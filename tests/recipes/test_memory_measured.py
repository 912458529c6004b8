"""Weights, gradients, optimizer state and activations against real Megatron ranks (`measure.py`)."""

import pytest

from tests.recipes.measure import CASES, compared

QUICK = [
    "wider Qwen3, linear recomputation, offloaded",
    "Qwen3, PP 2 of 1 and 3 layers",
    "GLM of 16 experts, TP 2 with SP, EP 2",
]


@pytest.mark.run
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_rank_holds_what_the_formulas_say(name):
    for ratios in compared(name):
        assert {*ratios["weights"], *ratios["gradients"]} == {1.0}
        assert ratios["optimizer"] == pytest.approx([1.0], abs=1e-9)
        assert ratios["activations"] == pytest.approx([1.0] * 3, abs=1e-3)
        assert ratios["loss"] == pytest.approx([1.0] * len(ratios["loss"]), abs=1e-3)
