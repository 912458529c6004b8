"""Weights, gradients, optimizer state and activations against real Megatron ranks (`measure.py`)."""

import pytest

from tests.recipes.plan.measure import CASES, compared, measured

pytestmark = pytest.mark.run

QUICK = [
    "wider Qwen3, linear recomputation, offloaded",
    "Qwen3, PP 2 of 1 and 3 layers",
    "GLM of 16 experts, TP 2 with SP, EP 2",
]


@pytest.fixture(scope="module")
def found(request):
    """Of all cases that are asked for."""
    asked = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]
    return measured(asked)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_rank_holds_what_the_formulas_say(name, found):
    for ratios in compared(name, found[name]):
        assert {*ratios["weights"], *ratios["gradients"]} == {1.0}
        assert ratios["optimizer"] == pytest.approx([1.0], abs=1e-9)
        assert ratios["activations"] == pytest.approx([1.0] * 3, abs=1e-3)
        assert ratios["loss"] == pytest.approx([1.0] * len(ratios["loss"]), abs=1e-3)
