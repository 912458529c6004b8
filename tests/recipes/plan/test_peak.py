"""The plan's memory against the peak of whole steps of real shapes (`peak.py`), and that nothing is live at it that need not be. In
a process of its own, in which much of torch is another."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO


def steps(*cases):
    command = [sys.executable, "-m", "tests.recipes.plan.peak", json.dumps(cases)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def bytes_of(at_peak, name):
    return sum(size for label, size in at_peak.items() if name in label)


@pytest.mark.slow
def test_the_plan_is_within_five_percent_of_the_peak_and_not_below_it():
    layouts = ["none", "selective", "linear", "full", "linear, offloaded", "linear, all offloaded"]
    cases = [("Qwen3-0.6B", layout, tokens) for layout in layouts for tokens in (8192, 155648)]
    found = steps(*cases)
    for case, (ratio, phase, *_) in zip(cases, found, strict=True):
        assert 0.95 < ratio < 1.002, case
        assert phase == "forward and backward"


@pytest.mark.slow
def test_what_is_live_at_the_peak_is_used_after_it():
    """Of the loss one chunk's logits, of a layer computed again its input and what its backward pass reads."""
    tokens, hidden = 155648, 1024
    (_, _, loss, _), (_, _, layer, _) = steps(("Qwen3-0.6B", "none", 8192), ("Qwen3-0.6B", "linear, offloaded", tokens))
    # Logits and their gradient, and the sum of the weight's in fp32.
    held = 4096 * 151936 * (2 + 2) + 151936 * hidden * 4
    assert bytes_of(loss, "model/loss.py") == pytest.approx(held, rel=0.01)
    assert bytes_of(layer, "_bias_dropout_add_func") == 2 * tokens * hidden, "the sum after attention, not the result"
    two_layers = 2 * tokens * (2 * hidden + 16 * (2 * 128 + 4))
    assert bytes_of(layer, "model/recompute.py:") == pytest.approx(two_layers, rel=1e-6)
