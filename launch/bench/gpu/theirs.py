"""The same steps with transformers: its best installed attention, gradient checkpointing, and PyTorch's fused AdamW.

Everything is in bf16, including the moments. This favours transformers most: fp32 weights and moments would take twice the memory. A
micro-batch is one sequence, even if ours packs several, because with SDPA transformers packs by a mask over all pairs of tokens.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from launch.bench.gpu.cases import Planned
from launch.bench.gpu.inputs import WARM_UP, RandomTokens, device_here, dtype_of, peer_config, random_weights
from launch.bench.gpu.ours import Write
from launch.bench.gpu.timing import timed
from recipes.config import Recipe

CHUNK = 4096  # tokens
LOGITS_BYTES = 14  # per logit, of transformers' loss: bf16, fp32, its softmax and gradient
MOST_LOGITS = 0.55  # share of the GPU's memory; weights, gradients, moments and activations need the rest


def attention() -> str:
    """Return transformers' name of the best installed implementation."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and find_spec("flash_attn_interface"):
        return "flash_attention_3"
    return "flash_attention_2" if on_gpu and find_spec("flash_attn") and find_spec("flash_attn_2_cuda") else "sdpa"


def sdpa_backend(heads: int, kv_heads: int, d: int, device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel that PyTorch's SDPA takes for causal attention with grouped keys. d: width of a head."""
    q, k, v = (torch.empty(1, n, 4096, d, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    number = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return str(torch.nn.attention.SDPBackend(number).name.lower())


def in_chunks(r: Recipe, longest: int) -> bool:
    """Return whether the loss is computed in chunks: transformers' own would fill the GPU's memory with logits."""
    memory = (r.gpu.memory_mib or 0) * 2**20
    return bool(memory) and LOGITS_BYTES * r.model.vocab * longest > MOST_LOGITS * memory


def measure_transformers(planned: Planned, known: dict[str, Any], write: Write) -> None:
    """Train the steps that are left. Write what `ours.measure_embedded` writes; `attention` names transformers' implementation and
    PyTorch's kernel, and `loss_in_chunks` says whether its loss is."""
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
    chunked = in_chunks(r, max(sequences))

    def backward(sequence: int, total: int) -> float:
        ids = torch.from_numpy(data.tokens(sequence).astype("int64")).to(device)[None]
        if chunked:
            loss = _loss_in_chunks(model, ids) / total
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss * ((ids.size(1) - 1) / total)
        loss.backward()
        return float(loss.detach())

    backward(len(sequences), WARM_UP)
    for group in optim.param_groups:
        group["lr"] = 0.0
    optim.step()  # makes the moments
    optim.zero_grad()
    for group in optim.param_groups:
        group["lr"] = r.optim.lr
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        total = sum(n - 1 for n in sequences)
        loss = sum(backward(s, total) for s in range(len(sequences)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), r.optim.clip_grad)
        optim.step()
        optim.zero_grad()
        return loss

    seconds, loss = [*known.get("seconds", ())], known.get("loss")
    kernel = attention()
    if kernel == "sdpa":
        m = r.model
        kernel += f", {sdpa_backend(m.heads, m.kv_heads, m.head_dim, device, dtype_of(r))}"
    for number in range(len(seconds), planned.case.steps):
        found, taken = timed(step, device)
        seconds.append(taken)
        loss = found if number == 0 else loss
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        write({"seconds": seconds, "loss": loss, "peak": peak, "attention": kernel, "loss_in_chunks": chunked})


def _loss_in_chunks(model: Any, ids: Tensor) -> Tensor:
    """Return the summed loss of the next tokens; a chunk's logits are recomputed in the backward pass."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(rows).float(), labels, reduction="sum")

    parts = zip(hidden.split(CHUNK), ids[0, 1:].split(CHUNK), strict=True)
    return torch.stack([checkpoint(loss, rows, labels, use_reentrant=False) for rows, labels in parts]).sum()
