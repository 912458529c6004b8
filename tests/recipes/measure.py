"""Measures what real Megatron ranks hold: `python -m tests.recipes.measure OUT` with a JSON list of cases on stdin.

A case is `{"words": recipe, "lengths": [tokens, …]}`. Each runs on as many gloo ranks as its recipe has; weights are drawn at
random, and attention saves exactly what flash attention does. OUT gets, for each case and rank: bytes of the buffers of
weights and gradients, of the optimizer's state, and for each length what one forward pass saved, the loss's share apart.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def main(out: Path) -> None:
    cases = json.load(sys.stdin)
    found = []
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            ranks = case["ranks"]
            torch.multiprocessing.spawn(_rank, (ranks, case, folder), nprocs=ranks)
            found += [
                json.loads((Path(folder) / f"{r}.json").read_text()) | {"case": number, "rank": r} for r in range(ranks)
            ]
    out.write_text(json.dumps(found))


def _rank(rank: int, ranks: int, case: dict[str, Any], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from launch.megatron import cpu

    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    from launch.megatron.rank import wrap
    from launch.model.gpt import build_chunks, transformer_config
    from recipes.compose import compose_recipe

    r = compose_recipe(case["words"])
    p = r.layout
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    config = transformer_config(r)
    chunks = build_chunks(r, config)
    torch.manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    found = {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "saved": [_saved(chunks[0], r, length) for length in case["lengths"]],
        **_held(*wrap(r, config, chunks)),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


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
    """Bytes that autograd saves, parameters left out, and how many of them are the loss's; storages are counted once."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import cross_entropy

    from launch.model.attention import PackedAttention

    p = r.layout
    tokens = torch.randint(0, r.model.vocab, (1, length // p.cp))
    boundaries = torch.tensor([0, length], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=length, max_seqlen_kv=length
    )
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

    original = cross_entropy._VocabParallelCrossEntropy.apply

    def loss(*arguments: Any) -> Any:
        nonlocal in_loss
        in_loss = True
        try:
            return original(*arguments)
        finally:
            in_loss = False

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, PackedAttention, "forward", PackedAttention.forward)
        stack.callback(setattr, cross_entropy._VocabParallelCrossEntropy, "apply", original)
        PackedAttention.forward = lambda self, q, k, v, *_, **__: _FlashAttention.apply(q, k, v).flatten(1)  # type: ignore
        cross_entropy._VocabParallelCrossEntropy.apply = loss
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x))
        chunk(tokens, None, None, labels=tokens, packed_seq_params=packed)
    sizes = [(t.untyped_storage().nbytes(), mine) for t, mine in saved.values()]
    return {"all": sum(n for n, _ in sizes), "loss": sum(n for n, mine in sizes if mine)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
