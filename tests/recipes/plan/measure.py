"""What real Megatron ranks hold, beside what the formulas say: `python -m tests.recipes.plan.measure` prints the table.

Every case runs on as many gloo ranks as its recipe has; weights are drawn at random, and attention saves exactly what flash
attention does. Taken of each rank: bytes of the buffers of weights and gradients, of the optimizer's state, and for each length
what one forward pass saved, the loss's share apart.
"""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.layout import world_size
from recipes.plan.activations import activations
from recipes.plan.partition import buffers, stages

QWEN, GLM = ["model=qwen3-tiny", "engine.dtype=bf16"], ["model=glm4.5-tiny", "engine.dtype=bf16"]
# Shapes that nothing was fitted to.
WIDE = ["model.hidden=160", "model.ffn=480", "model.heads=8", "model.head_dim=32", "model.layers=3", "model.vocab=1536"]
MANY = [
    "model.hidden=64",
    "model.experts=16",
    "model.top_k=5",
    "model.expert_ffn=56",
    "model.heads=6",
    "model.head_dim=16",
]
CASES = {
    "Qwen3, DP 2": [*QWEN],
    "Qwen3, TP 2 with SP": [*QWEN, "layout.tp=2", "layout.sp=true"],
    "Qwen3, PP 2 of 1 and 3 layers": [*QWEN, "layout.pp=2", "layout.first_stage_layers=1"],
    "Qwen3, TP 2, PP 2, VPP 2": [*QWEN, "layout.tp=2", "layout.pp=2", "layout.vpp=2", "cluster.gpus_per_node=4"],
    "GLM, EP 2": [*GLM],
    "GLM, TP 2 with SP": [*GLM, "layout.tp=2", "layout.sp=true", "layout.ep=1"],
    "GLM, TP 2 with SP, CP 2, EP 4": [
        *GLM, "layout.tp=2", "layout.sp=true", "layout.cp=2", "layout.ep=4", "cluster.gpus_per_node=4"
    ],
    "GLM, PP 2, EP 2": [*GLM, "model.layers=4", "layout.pp=2", "cluster.gpus_per_node=4"],
    "wider Qwen3, CP 2": [*QWEN, *WIDE, "layout.cp=2"],
    "GLM of 16 experts, TP 2 with SP, EP 2": [*GLM, *MANY, "layout.tp=2", "layout.sp=true"],
    "Qwen3, TP 2 with SP, loss in chunks": [*QWEN, "layout.tp=2", "layout.sp=true", "layout.loss_chunk=512"],
    "Qwen3, full recomputation": [*QWEN, "layout.recompute=full", "cluster.gpus_per_node=1"],
    "Qwen3, linear recomputation": [*QWEN, "layout.recompute=linear", "cluster.gpus_per_node=1"],
    "wider Qwen3, linear recomputation, offloaded": [
        *QWEN, *WIDE, "layout.recompute=linear", "layout.offload=true", "cluster.gpus_per_node=1"
    ],
    "GLM, TP 2 with SP, linear recomputation, offloaded": [
        *GLM, "layout.tp=2", "layout.sp=true", "layout.ep=1", "layout.recompute=linear", "layout.offload=true"
    ],
    "wider Qwen3, selective recomputation": [*QWEN, *WIDE, "layout.recompute=selective", "cluster.gpus_per_node=1"],
    "GLM, EP 2, selective recomputation": [*GLM, "layout.recompute=selective"],
}  # fmt: skip
LENGTHS = [256, 1024, 2304]


Held = list[dict[str, Any]]  # by rank


def measured(names: Iterable[str]) -> dict[str, Held]:
    """What the ranks of some cases hold. Cases of as many ranks share their processes, which take seconds to start."""
    by_ranks: dict[int, list[str]] = {}
    for name in names:
        by_ranks.setdefault(world_size(compose_recipe(CASES[name])), []).append(name)
    found: dict[str, Held] = {}
    for ranks, some in by_ranks.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (ranks, some, folder), nprocs=ranks)  # type: ignore[attr-defined]
            of_ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
        found |= {name: [of_rank[name] for of_rank in of_ranks] for name in some}
    return found


def compared(name: str, found: Held) -> Iterator[dict[str, list[float]]]:
    """For every pipeline stage, measured over predicted: `weights` and `gradients` of each rank, `optimizer` of their mean, and
    for each length the mean of `activations` and of the `loss`."""
    r = compose_recipe(CASES[name])
    a = activations(r, imbalance=1.0)  # experts are balanced over the ranks taken together
    for stage, chunks in enumerate(stages(r.model, r.layout)):
        here = [f for f in found if f["stage"] == stage]
        held = buffers(r.model, r.layout, chunks, len(found))
        elements = sum(b.elements for b in held)
        ratios = {
            "weights": [f["weights"] / (2 * elements) for f in here],
            "gradients": [f["gradients"] / (4 * elements) for f in here],
            # fp32 weights and two moments; padding makes the ranks' shares unlike.
            "optimizer": [mean(f["optimizer"] for f in here) / (12 * sum(b.parameters / b.ranks for b in held))],
            "activations": [],
            "loss": [],
        }
        for i, length in enumerate(LENGTHS):
            tokens = length // r.layout.cp
            saved = mean(f["saved"][i]["all"] - f["saved"][i]["loss"] for f in here)
            kept = a.chunk(chunks[0], r.layout.recompute)
            away = chunks[0].layers * a.saved_per_layer(r.layout.recompute) if r.layout.offload else 0.0
            ratios["activations"].append(saved / (tokens * (kept - away)))
            if chunks[0].output:
                ratios["loss"].append(mean(f["saved"][i]["loss"] for f in here) / (tokens * a.softmax))
        yield ratios


def main() -> None:
    print("| measured / predicted | weights | gradients | optimizer | activations |\n|---|---|---|---|---|")
    for name, found in measured(CASES).items():
        stages_found = list(compared(name, found))
        cells = []
        for part in ("weights", "gradients", "optimizer", "activations"):
            ratios = [x for one in stages_found for x in one[part]]
            cells.append(
                "exact" if all(abs(x - 1) < 1e-9 for x in ratios) else f"{min(ratios):.3f} to {max(ratios):.3f}"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _rank(rank: int, ranks: int, names: list[str], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from launch.megatron import cpu

    cpu.install()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {}
    for name in names:
        found[name] = _of_rank(compose_recipe(CASES[name]))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _of_rank(r: Recipe) -> dict[str, Any]:
    """What this rank of a recipe holds."""
    from megatron.core import parallel_state, tensor_parallel

    from launch.megatron.rank import initialize_parallel, wrap
    from launch.model.gpt import build_chunks, transformer_config

    initialize_parallel(r.layout)
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    config = transformer_config(r)
    chunks = build_chunks(r, config)
    torch.manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "saved": [_saved(chunks[0], r, length) for length in LENGTHS],
        **_held(*wrap(r, config, chunks)),
    }


def _held(model: list[Any], optimizer: Any) -> dict[str, int]:
    all_buffers = [b for chunk in model for b in chunk.buffers + chunk.expert_parallel_buffers]
    found = {
        "weights": sum(b.param_data.nbytes for b in all_buffers),
        "gradients": sum(b.grad_data.nbytes for b in all_buffers),
        "optimizer": 0,
    }
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        one._init_optimizer_states_with_dummy_values()
        inner = one.optimizer
        moments = [t for state in inner.state.values() for key, t in state.items() if key != "step"]
        masters = [t for group in one.shard_fp32_from_float16_groups for t in group]
        found["optimizer"] += sum(t.nbytes for t in (*moments, *masters))
    return found


class _FlashAttention(torch.autograd.Function):
    """Computes nothing and saves what flash attention saves."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:2]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> Any:
        raise NotImplementedError


def _saved(chunk: Any, r: Any, length: int) -> dict[str, int]:
    """Bytes that autograd saves, with the angles of rotation and without parameters, and how many of them are the loss's;
    storages are counted once."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy

    from launch.model import loss as in_chunks
    from launch.model.attention import PackedAttention, packed_of

    p = r.layout
    tokens = torch.randint(0, r.model.vocab, (1, length // p.cp))
    packed = packed_of(r.model, [length], torch.device("cpu"), p.cp, parallel_state.get_context_parallel_rank())
    if not chunk.pre_process:
        shape = (length // p.cp // (p.tp if p.sp else 1), 1, r.model.hidden)
        chunk.set_input_tensor(torch.zeros(shape, dtype=chunk.config.params_dtype, requires_grad=True))
    parameters = {q.untyped_storage().data_ptr() for q in chunk.parameters()}
    saved: dict[int, tuple[torch.Tensor, bool]] = {}  # the tensors are kept, so that no address comes twice
    in_loss = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            saved.setdefault(address, (tensor, in_loss))
        return tensor

    for angles in packed.rotation:
        pack(angles)  # a layer that is computed again has them from its micro-batch, not from autograd
    original = cross_entropy._VocabParallelCrossEntropy.apply

    def loss(*arguments: Any) -> Any:
        nonlocal in_loss
        in_loss = True
        try:
            return original(*arguments)
        finally:
            in_loss = False

    chunked = in_chunks._ChunkedCrossEntropy.apply

    def loss_in_chunks(hidden: torch.Tensor, *others: Any) -> Any:
        nonlocal in_loss
        pack(hidden)  # is the output layer's
        in_loss = True
        try:
            return chunked(hidden, *others)
        finally:
            in_loss = False

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, PackedAttention, "_kernel", PackedAttention._kernel)
        stack.callback(setattr, cross_entropy._VocabParallelCrossEntropy, "apply", original)
        PackedAttention._kernel = lambda self, packed, q, k, v: _FlashAttention.apply(q, k, v)  # type: ignore
        cross_entropy._VocabParallelCrossEntropy.apply = loss
        stack.callback(setattr, in_chunks._ChunkedCrossEntropy, "apply", chunked)
        in_chunks._ChunkedCrossEntropy.apply = loss_in_chunks
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
        chunk(tokens, None, None, labels=tokens.clone(), packed_seq_params=packed)
    sizes = [(t.untyped_storage().nbytes(), mine) for t, mine in saved.values()]
    return {"all": sum(n for n, _ in sizes), "loss": sum(n for n, mine in sizes if mine)}


if __name__ == "__main__":
    main()
