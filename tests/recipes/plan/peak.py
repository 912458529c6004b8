"""Compare the peak memory of one whole training step of real shapes, tensor by tensor, with `recipes.plan.memory`.

`python -m tests.recipes.plan.peak` prints the table, `python -m tests.recipes.plan.peak MODEL LAYOUT TOKENS` what was live at the
peak, and with a list of such cases as JSON what the tests ask of each.

Tensors are fake: they have a shape and no memory, so a step of 155,648 tokens takes seconds on a laptop. Megatron's modules, its data
parallelism and optimizer run as they are; counted is each storage from the operation that made it to its end. What a kernel takes
for itself and what the allocator rounds up are not seen, save for flash attention's workspace (`tracker.py`).
"""

import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.plan.memory import Load, StageMemory, gpu_memory
from tests.recipes.plan.tracker import Tracker, one_kernel

QWEN_4B = ["model=qwen3-4b"]
QWEN_06B = [
    *QWEN_4B, "model.name=qwen3-0.6b", "model.layers=28", "model.hidden=1024", "model.ffn=3072", "model.heads=16",
]  # fmt: skip
MODELS = {"Qwen3-4B": QWEN_4B, "Qwen3-0.6B": QWEN_06B}
LAYOUTS = {
    "none": [],
    "selective": ["layout.recompute=selective"],
    "linear": ["layout.recompute=linear"],
    "full": ["layout.recompute=full"],
    "linear, offloaded": ["layout.recompute=linear", "layout.offload=true"],
    "full, offloaded": ["layout.recompute=full", "layout.offload=true"],
    "linear, all offloaded": ["layout.recompute=linear", "layout.offload=true", "layout.optimizer_state=offloaded"],
}
TOKENS = [8192, 32768, 155648]
WARM_UP = 256  # tokens of a step before: it makes the optimizer's moments


def recipe_of(model: str, layout: str) -> Recipe:
    fixed = [
        "cluster=h100x1",
        "layout.search=false",
        "layout.sp=false",
        "layout.loss_chunk=4096",
        "layout.max_tokens_per_gpu=155648",
    ]
    return compose_recipe([*MODELS[model], *fixed, *LAYOUTS[layout]])


def predicted(r: Recipe, tokens: int) -> StageMemory:
    (stage,) = gpu_memory(r, Load([[tokens]]))
    return stage


def total(stage: StageMemory) -> float:
    """Without the allowances for what no tensor holds."""
    return stage.total - stage.runtime - stage.fragmentation


def set_up() -> None:
    """This process as a rank of one, whose fused functions are one kernel each."""
    warnings.simplefilter("ignore")
    from launch.megatron import cpu

    cpu.install()
    _alone()
    from launch.model import compiled

    compiled.fused = one_kernel
    torch.compile = one_kernel  # type: ignore  # is Megatron's `jit_fuser`
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.optimizer import clip_grads

    from launch.model import attention_reuse
    from launch.model.attention import PackedAttention
    from launch.model.attention_kernels import varlen
    from launch.model.offload_streams import CopyStreams

    dist.init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    clip_grads.l2_norm_impl = _norm
    PackedAttention._kernel = lambda self, packed, q, k, v: varlen(q, k, v, packed, self.scale)  # type: ignore
    torch.nn.Module._apply = lambda module, *_, **__: module  # all is where and what it is to be
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata  # type: ignore
    attention_reuse._same = lambda a, b: (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and (a.dtype, a.size(), a.stride(), a.storage_offset()) == (b.dtype, b.size(), b.stride(), b.storage_offset())
    )

    def empty_like(_: CopyStreams, tensor: Tensor) -> Tensor:
        assert Tracker.current is not None
        with Tracker.current.on_host():
            return torch.empty_like(tensor)

    CopyStreams.empty_like = empty_like  # type: ignore


def _alone() -> None:
    """A rank of one sends nothing: its part is the whole, in place."""

    class Done:
        def wait(self) -> None:
            pass

    @contextlib.contextmanager
    def together(*_: Any, **__: Any) -> Iterator[Done]:
        yield Done()

    def gather_object(found: list[Any], mine: Any, *_: Any) -> None:
        found[0] = mine

    for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast"):
        setattr(dist, name, lambda *_, **__: Done())
    dist._coalescing_manager = together  # type: ignore
    dist.all_gather_object = gather_object  # type: ignore[assignment]


def _norm(_: int, __: Tensor, tensors: list[list[Tensor]], *others: Any) -> tuple[Tensor, None]:
    """Megatron's without Apex (`local_multi_tensor_l2_norm`), which makes one tensor of numbers that it reads one by one."""
    norms = [torch.norm(tensor) for tensor in tensors[0]]
    return torch.tensor([sum(float(norm) for norm in norms)]), None


def measured(r: Recipe, tokens: int) -> Tracker:
    """One step of a micro-batch of one sequence, after a short one."""
    from megatron.core.distributed import finalize_model_grads

    from launch.megatron.batch import Batch
    from launch.megatron.rank import wrap
    from launch.model.attention import packed_of
    from launch.model.gpt import build_chunks, transformer_config

    with FakeTensorMode(), Tracker() as tracker:
        Tracker.current = tracker
        config = transformer_config(r)
        model, optimizer = wrap(r, config, build_chunks(r, config))
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        for length in (WARM_UP, tokens):
            tracker.start()
            batch = Batch(
                tokens=torch.zeros(1, length, dtype=torch.long),
                labels=torch.zeros(1, length, dtype=torch.long),
                supervised=torch.ones(1, length, dtype=torch.bool),
                packed=packed_of(r.model, [length], torch.device("cpu")),
            )
            _step(tracker, model, optimizer, batch)
    return tracker


def _step(tracker: Tracker, model: Any, optimizer: Any, batch: Any) -> None:
    """As `launch.megatron.rank.Rank` has it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from launch.megatron.rank import _forward_step

    tracker.phase = "forward and backward"
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([batch]),
        model=model[0],
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    tracker.phase = "update"
    optimizer.prepare_grads()
    float(optimizer.get_grad_norm())
    optimizer.step()


PHASES = ("forward and backward", "update")


def show(model: str, layout: str, tokens: int) -> None:
    """What is live at the peak, by the line that made it."""
    r = recipe_of(model, layout)
    found, stage = measured(r, tokens), predicted(r, tokens)
    print(f"{found.peak / 1e9:.2f} GB in {found.peak_phase}, {total(stage) / 1e9:.2f} GB predicted:")
    print("  ".join(f"{name} {size / 1e9:.2f}" for name, size in vars(stage).items()))
    for label, size in found.at_peak.most_common():
        if size >= 1e6:
            print(f"{size / 1e9:9.3f} GB  {label}")
    for place, count in found.waits.most_common():
        print(f"{count:9} waits  {place}")


def rows(cases: list[tuple[str, str, int]]) -> None:
    """Of each case the measured over the predicted peak, its phase, what was live at it, and the peak of each phase."""
    for model, layout, tokens in cases:
        r = recipe_of(model, layout)
        found = measured(r, tokens)
        ratio = found.peak / total(predicted(r, tokens))
        print(json.dumps([ratio, found.peak_phase, found.at_peak, found.phase_peaks]))


def table() -> None:
    names = [
        "model",
        "recomputation",
        "tokens",
        "measured GB",
        "predicted GB",
        "measured / predicted",
        *PHASES,
        "waits",
    ]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for model, layout, tokens in itertools.product(MODELS, LAYOUTS, TOKENS):
        r = recipe_of(model, layout)
        found, wanted = measured(r, tokens), total(predicted(r, tokens))
        sizes = [found.peak, wanted, *(found.phase_peaks[p] for p in PHASES)]
        peak, foretold, *phases = (f"{size / 1e9:.2f}" for size in sizes)
        cells = [model, layout, f"{tokens:,}", peak, foretold, f"{found.peak / wanted:.3f}", *phases]
        print(f"| {' | '.join(cells)} | {sum(found.waits.values())} |", flush=True)


if __name__ == "__main__":
    set_up()
    match sys.argv[1:]:
        case [model, layout, tokens]:
            show(model, layout, int(tokens))
        case [cases]:
            rows(json.loads(cases))
        case _:
            table()
