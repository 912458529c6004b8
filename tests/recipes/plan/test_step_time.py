from dataclasses import replace

import numpy as np
import pytest

from recipes.compose.recipe import compose_recipe
from recipes.config import AttentionKernel, OptimizerState, Recompute
from recipes.dimensions import flops, parameters
from recipes.plan.activations import IMBALANCE
from recipes.plan.step_time import ATTENTION_BACKWARD, Clock, attention_efficiencies, predictable

TOKENS = np.array([[32_768.0, 65_536.0, 8_192.0, 16_384.0]])
PAIRS = TOKENS * (TOKENS + 1) / 2


def clock(*words, **changes):
    r = compose_recipe(["cluster=h100x64", *words])
    return Clock(replace(r, layout=replace(r.layout, **changes)))


def one_rank(**changes):
    return clock("model=qwen3-32b", "layout=data_parallel", **changes)


def test_matrix_products_and_attention_are_the_models_operations_at_the_attained_rate():
    c = one_rank()
    parts, f, g = c.step(TOKENS, PAIRS), flops(c.r.model), c.r.gpu
    peak = g.bf16_tflops * 1e12
    assert parts["matrix products"] == pytest.approx(3 * f.a_token * TOKENS.sum() / peak / g.matmul_efficiency)
    forward, backward = attention_efficiencies(c.r)
    taken = f.a_pair * PAIRS.sum() / peak * (1 / forward + ATTENTION_BACKWARD / backward)
    assert parts["attention"] == pytest.approx(taken)
    for name in ("tensor parallel", "context parallel", "expert parallel", "pipeline messages"):
        assert parts[name] == 0.0
    assert parts["bubbles"] == pytest.approx(0.0, abs=1e-9)


def test_attention_runs_at_the_rate_of_its_kernel():
    def rates(*words):
        return attention_efficiencies(compose_recipe(["model=qwen3-32b", "layout=data_parallel", *words]))

    hopper = compose_recipe(["cluster=h100x8", "layout=data_parallel"]).gpu
    for kernel in AttentionKernel:
        own = getattr(hopper, f"{kernel.value}_efficiency"), getattr(hopper, f"{kernel.value}_backward_efficiency")
        assert rates("cluster=h100x8", "engine=megatron", f"gpu.attention={kernel.value}") == own and None not in own
        assert rates("cluster=h100x8", "engine=slime", f"gpu.attention={kernel.value}") == rates(
            "cluster=h100x8", "engine=megatron", "gpu.attention=cudnn"
        )
    assert rates("cluster=a100x64", "engine=slime") == rates("cluster=a100x64", "engine=megatron") == (0.7, 0.6)
    unknown = compose_recipe(["cluster=a100x64", "engine=megatron", "layout=data_parallel", "gpu.attention=flash4"])
    assert not predictable(unknown)


def test_the_busiest_experts_take_more_than_the_mean():
    c = clock("model=glm4.5-air", "layout=expert_parallel", ep=8)
    p, f, g = parameters(c.r.model), flops(c.r.model), c.r.gpu
    more = 2 * p.active_experts * (IMBALANCE - 1)
    expected = 3 * (f.a_token + more) * TOKENS.sum() / (g.bf16_tflops * 1e12 * g.matmul_efficiency)
    assert c.step(TOKENS, PAIRS)["matrix products"] == pytest.approx(expected)


def test_recomputation_repeats_nothing_the_mlps_all_but_attention_or_all_layers():
    none, selective, linear, full = (one_rank(recompute=how).step(TOKENS, PAIRS) for how in Recompute)
    assert none["recomputation"] == 0.0 < selective["recomputation"] < linear["recomputation"]
    assert full["recomputation"] == pytest.approx(linear["recomputation"] + full["attention"] * _forward_share(PAIRS))


def _forward_share(pairs):
    """Of attention's time in a step, without recomputation."""
    down, up = one_rank().passes(0, TOKENS, pairs)
    return down["attention"].sum() / (down["attention"].sum() + up["attention"].sum())


def test_the_host_is_waited_for_only_where_there_is_too_little_to_compute():
    long = one_rank(recompute=Recompute.full, offload=True).step(TOKENS, PAIRS)
    assert long["waiting for the host"] == 0.0
    c = clock("model=qwen3-4b", "cluster=h100x1", "layout=data_parallel", recompute=Recompute.linear, offload=True)
    slow = Clock(replace(c.r, gpu=replace(c.r.gpu, pcie_gb_s=1.0)))
    assert slow.step(TOKENS, PAIRS)["waiting for the host"] > 0.0 == c.step(TOKENS, PAIRS)["waiting for the host"]


def test_tensor_parallelism_cuts_the_products_and_sends_messages():
    eight = one_rank(tp=8, sp=True).step(TOKENS, PAIRS)
    assert 8 * eight["matrix products"] == pytest.approx(one_rank().step(TOKENS, PAIRS)["matrix products"])
    assert 0 < eight["tensor parallel"] < one_rank(tp=16, sp=True).step(TOKENS, PAIRS)["tensor parallel"], (
        "over the network"
    )


def test_the_ring_hides_behind_the_attention_of_long_sequences():
    c = one_rank(cp=8, tp=2, sp=True)
    short = np.array([[64 * 1024.0]])
    packed = c.step(short, short * 1024 / 2)["context parallel"]  # of sequences of 1,024
    assert packed > c.step(short, short * short / 2)["context parallel"] == 0.0


def test_a_pipeline_waits_and_interleaving_waits_less():
    plain = one_rank(pp=4).step(TOKENS, PAIRS)
    interleaved = one_rank(pp=4, vpp=2).step(TOKENS, PAIRS)
    assert plain["bubbles"] > interleaved["bubbles"] > 0
    assert interleaved["pipeline messages"] > plain["pipeline messages"]


def test_an_optimizer_on_the_host_takes_longer():
    ends = [one_rank(tp=8, sp=True, optimizer_state=s).after["optimizer"] for s in OptimizerState]
    assert ends[0] == ends[1] < ends[2]


def test_ranks_that_share_experts_wait_for_each_other_in_every_micro_batch():
    tokens = np.array([[1e5, 1e4], [1e4, 1e5]])  # each rank's long micro-batch is the other's short one
    pairs = tokens * (tokens + 1) / 2
    alone = clock("model=glm4.5-air", "layout=expert_parallel", tp=8, sp=True, ep=8).step(tokens, pairs)
    shared = clock("model=glm4.5-air", "layout=expert_parallel", tp=8, sp=True, ep=16).step(tokens, pairs)
    assert alone["bubbles"] == pytest.approx(0.0, abs=1e-9)
    assert shared["bubbles"] > 0.5 * shared["attention"]
