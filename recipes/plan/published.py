"""The time model compared with published throughputs: calibrated on one half of them, with its error on the other half. It serves
slime; the embedded engine's times are measured (`launch/bench/GPU.md`).

Few throughputs of long agentic training are published. No figure for 32k to 152k tokens was found for the shipped models. A
figure is only listed, not predicted, if its layout or model is not public.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from recipes.compose.recipe import compose_recipe
from recipes.config import EngineName, Layout, Recipe
from recipes.dimensions import flops
from recipes.plan.step_time import Clock


@dataclass(frozen=True)
class Published:
    """A published throughput."""

    name: str
    tflops: float  # model TFLOP/s of one GPU, without recomputation
    recipe: Recipe | None  # the recipe that reproduces it; None if its model or layout is not public
    length: int  # tokens of a sequence


@cache
def figures() -> tuple[Published, ...]:
    """Return the published throughputs, the figure for calibration first.

    - Qwen3-32B by TRL on 8 H100: 101 tokens/s per GPU at 1M tokens, sequence-parallel with full recomputation.
    - Qwen3-30B-A3B by NeMo Automodel on 8 H100: 277 TFLOP/s per GPU at 4k tokens.
    - GLM-5.2 on 608 H100: 39.6 TFLOP/s per GPU at 200k tokens. Its dimensions and layout are not public.
    """
    words = [
        "model=qwen3-32b",
        "cluster=h100x8",
        "engine=slime",
        "layout=data_parallel",
        "layout.cp=8",
        "layout.recompute=full",
    ]
    long = compose_recipe(words)
    cost = flops(long.model)
    # Dimensions of Qwen3-30B-A3B's config.json. Its family is not supported, so the router counts as GLM-4.5's. Figures of
    # this kind do not show the difference.
    experts = compose_recipe(["model=glm4.5-air", "cluster=h100x8", "engine=slime", "layout=data_parallel"]).model
    small = replace(
        long.model, name="qwen3-30b-a3b", family=experts.family, layers=48, hidden=2048, ffn=6144, heads=32, kv_heads=4,
        experts=128, top_k=8, expert_ffn=768,
    )  # fmt: skip
    spread = replace(long, model=small, layout=Layout(ep=8, max_tokens_per_gpu=8192))
    return (
        Published("TRL, Qwen3-32B, 1M tokens, 8 H100", 3 * cost.sequence(10**6) / 1e6 * 101 / 1e12, long, 10**6),
        Published("NeMo Automodel, Qwen3-30B-A3B, 4k tokens, 8 H100", 277.0, spread, 4096),
        Published("GLM-5.2, 200k tokens, 608 H100", 39.6, None, 200_000),
    )


def predicted(one: Published) -> float:
    """Return the TFLOP/s per GPU that the uncalibrated model predicts, with eight micro-batches per step."""
    r = one.recipe
    assert r is not None
    batches = 8
    tokens = np.full((1, batches), float(one.length))
    seconds = sum(Clock(r).step(tokens, tokens * (tokens + 1) / 2).values())
    # Operations of one data-parallel rank; every rank has as many.
    work = 3 * flops(r.model).sequence(one.length) * batches
    return work / (r.layout.cp * r.layout.tp * r.layout.pp) / seconds / 1e12


@dataclass(frozen=True)
class Calibration:
    """Correction of the time model's speed."""

    factor: float  # attained speed / speed of the model
    text: str  # source of the factor, and its error on the other figures


def calibration(r: Recipe) -> Calibration:
    """Return the calibration of the recipe's engine on its GPU.

    The embedded engine runs at the rates of its own measurement. For slime the first comparable figure is the calibration and the
    other figures test it. All figures are of the H100. The H200 has the same chip, so it takes the same factor.
    """
    if r.gpu.name not in ("h100", "h200"):
        return Calibration(1.0, f"uncalibrated: no figure of long training on {r.gpu.name} was found")
    if r.engine.name is EngineName.megatron:
        chip = "" if r.gpu.name == "h200" else ", whose chip is the same"
        text = f"rates of one H200{chip}, where steps were 1% longer to 8% shorter than measured (launch/bench/GPU.md)"
        return Calibration(1.0, f"{text}; messages between GPUs are not measured")
    comparable = [f for f in figures() if f.recipe is not None]
    fitted, *held = comparable
    factor = fitted.tflops / predicted(fitted)
    errors = [f"{predicted(f) * factor / f.tflops - 1:+.0%} on {f.name}" for f in held]
    text = f"calibrated on {fitted.name}, which attains {factor:.2f} of the model's speed; predicted with that: {', '.join(errors)}"
    if r.gpu.name == "h200":
        text = f"uncalibrated: no figure on h200 was found, the same chip's is taken: {text}"
    return Calibration(factor, text)


def published_rows() -> list[tuple[str, str, str, str]]:
    """Return rows of name, published figure, calibrated prediction and error, for the README."""
    factor = calibration(compose_recipe(["cluster=h100x8", "engine=slime", "layout=data_parallel"])).factor
    made = []
    for i, one in enumerate(figures()):
        if one.recipe is None:
            made.append(
                (one.name, f"{one.tflops:.1f}", "–", "cannot be compared: dimensions and layout are not public")
            )
            continue
        value = predicted(one) * factor
        error = "calibrated on it" if i == 0 else f"{value / one.tflops - 1:+.0%}"
        made.append((one.name, f"{one.tflops:.1f}", f"{value:.1f}", error))
    return made
