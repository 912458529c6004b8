"""The same steps with transformers: its best installed attention, gradient checkpointing, and PyTorch's fused AdamW.

Everything is in bf16, including the moments. This favours transformers most: fp32 weights and moments would take twice the memory. A
micro-batch is one sequence, even if ours packs several, because with SDPA transformers packs by a mask over all pairs of tokens.
"""

from importlib.util import find_spec
from typing import Any

import torch

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import WARM_UP, RandomTokens, device_here, dtype_of, peer_config, random_weights
from launch.bench.gpu.timing import timed


def attention() -> str:
    """Return transformers' name of the best installed implementation."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and find_spec("flash_attn_interface"):
        return "flash_attention_3"
    return "flash_attention_2" if on_gpu and find_spec("flash_attn") else "sdpa"


def measure_transformers(planned: Planned) -> dict[str, Any]:
    """Train the case's steps. Return what `ours.measure` returns, and `attention`, the implementation."""
    from transformers import AutoModelForCausalLM

    r, sequences, device = planned.recipe, planned.case.sequences, device_here()
    with device:
        model = AutoModelForCausalLM.from_config(peer_config(r), dtype=dtype_of(r), attn_implementation=attention())
    read = random_weights(r, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optim = torch.optim.AdamW(
        model.parameters(), r.optim.lr, (r.optim.beta1, r.optim.beta2), r.optim.eps, r.optim.weight_decay, fused=True
    )
    data = RandomTokens([*sequences, min(WARM_UP, max(sequences))], r.model.vocab)

    def backward(sequence: int, total: int) -> float:
        ids = torch.from_numpy(data.tokens(sequence).astype("int64")).to(device)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * ((ids.size(1) - 1) / total)
        loss.backward()
        return float(loss.detach())

    backward(len(sequences), WARM_UP)
    optim.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        total = sum(n - 1 for n in sequences)
        loss = sum(backward(s, total) for s in range(len(sequences)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.optim.clip_grad)
        optim.step()
        optim.zero_grad()
        return loss

    steps = [timed(step, device) for _ in range(planned.case.steps)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"seconds": [s for _, s in steps], "loss": steps[0][0], "peak": peak, "attention": attention()}
