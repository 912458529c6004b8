"""The loss in chunks, and whole ranks: layouts beside each other, a GPU's bf16 beside a CPU's fp32, memory beside the plan."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from launch.bench.gpu.cases import Case, Planned
from launch.bench.gpu.measurement import write_case
from launch.bench.gpu.ours import rank_of
from launch.bench.gpu.smoke.outcome import Bench, Outcome, group_of_one, relative
from launch.megatron.rank import Rank
from launch.megatron.rank_export import hf_tensors
from launch.model.loss import _ChunkedCrossEntropy
from recipes.compose.recipe import compose_recipe
from recipes.config import Dtype, Recipe
from recipes.paths import REPO
from recipes.plan import planner
from recipes.plan.planner import RunPlan
from recipes.plan.search import Sequences

LAYOUTS = {
    "nothing again": "layout.recompute=none",
    "linear again": "layout.recompute=linear",
    "all offloaded": "layout.recompute=linear layout.offload=true layout.optimizer_state=offloaded",
}
LENGTHS = (4600, 1500, 2)
LIMIT = 1e-2  # of the loss in bf16
SAME = 5e-3  # relative difference between layouts: flash attention adds its gradients in no fixed order
BESIDE_FP32 = 0.08  # relative error of a tensor's gradient in bf16, beside fp32
OFF = 0.05


def check_loss(bench: Bench) -> Iterator[Outcome]:
    """Compare the loss in chunks with the plain one: value, gradients and peak memory."""
    tokens, hidden, vocab, chunk = (16_384, 2560, 151_936, 4096) if bench.on_gpu else (64, 16, 128, 16)
    new = torch.Generator(bench.device).manual_seed(0)
    rows = torch.randn(tokens, hidden, generator=new, device=bench.device, dtype=bench.dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=new, device=bench.device) * 0.02).to(bench.dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=new, device=bench.device)
    peak = before = 0
    with group_of_one(bench) as group:
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        losses = _ChunkedCrossEntropy.apply(rows, weight, labels, chunk, group, False)
        mine = [losses.detach(), *torch.autograd.grad(losses.sum(), (rows, weight))]
        if bench.on_gpu:
            peak = torch.cuda.max_memory_allocated() - before
    of_weight = torch.zeros_like(weight, dtype=torch.float32)
    plain, of_rows = [], []
    for part, own in zip(rows.detach().split(chunk), labels.split(chunk), strict=True):
        a, b = part.float().requires_grad_(), weight.detach().float().requires_grad_()
        loss = F.cross_entropy(F.linear(a, b), own, reduction="none")
        gradients = torch.autograd.grad(loss.sum(), (a, b))
        plain.append(loss.detach())
        of_rows.append(gradients[0])
        of_weight += gradients[1]
    errors = [relative(*pair) for pair in zip(mine, (torch.cat(plain), torch.cat(of_rows), of_weight), strict=True)]
    size = torch.finfo(bench.dtype).bits // 8
    # As `recipes.plan.memory` counts them: two chunks of logits, the weight's gradient in fp32 and rounded, the rows' gradient.
    planned = 2 * chunk * vocab * size + vocab * hidden * (4 + size) + tokens * hidden * size
    said = f"value {errors[0]:.1e}, gradients {errors[1]:.1e} and {errors[2]:.1e}"
    said += f"; peak {peak / 1e9:.2f} GB, at most {planned / 1e9:.2f} by the plan" if peak else ""
    yield Outcome("loss in chunks", said, all(e < LIMIT for e in errors) and peak <= planned * (1 + OFF))


def start_cpu_rank(bench: Bench, recipe: Recipe, folder: Path) -> subprocess.Popen:
    """Start a process that writes the gradients of the fp32 CPU engine, with which `check_ranks` compares."""
    write_case(folder, in_fp32(planned(bench, recipe, LAYOUTS["nothing again"])))
    command = [sys.executable, "-m", "launch.bench.gpu.smoke.cpu_rank", str(folder)]
    with (folder / "log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command, cwd=REPO, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stdout=log, stderr=log
        )


def planned(bench: Bench, recipe: Recipe, layout: str, model: str = "") -> Planned:
    """Return the plan of two steps of a small model. recipe: the command's, which names kernels and folders. model: overrides of
    another model than Qwen3's."""
    count, machine = len(LENGTHS), "cluster=h200x1" if bench.on_gpu else "cluster=local cluster.gpus_per_node=1"
    shape = model or f"model=qwen3-4b {bench.shape}"
    words = f"{shape} {machine} engine=megatron layout=data_parallel {layout} run=smoke"
    words += f" optim.batch_size={count} optim.epochs=2 optim.copies=1 layout.max_tokens_per_gpu=8192"
    words += f" layout.loss_chunk=2048 gpu.attention={recipe.gpu.attention.value}"
    own = compose_recipe([*words.split(), f"cluster.root={recipe.cluster.root}"])
    case = Case("4B", "two layers", LENGTHS)
    return Planned(case, planner.make_plan(own, Sequences(range(count), LENGTHS, "drawn at random")))


def in_fp32(one: Planned) -> Planned:
    """Return the case in fp32, for the CPU."""
    r = one.recipe
    exact = replace(r, engine=replace(r.engine, dtype=Dtype.fp32))
    return Planned(one.case, RunPlan(exact, one.plan.sequences, None))


def gradients_of(one: Planned) -> dict[str, Tensor]:
    """Return the gradients of the first step by their Hugging Face names."""
    with rank_of(one) as rank:
        rank.gradient(0)
        return _gradients(rank)


def trained(one: Planned, steps: int = 1) -> tuple[float, int, dict[str, Tensor], dict[str, Tensor]]:
    """Train one step. Return its loss, its gradients and the weights after it, by their Hugging Face names, and the peak bytes of the
    last of `steps` steps: from the second on, the optimizer's moments are there."""
    gc.collect()  # an earlier rank's memory must not count as there before
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with rank_of(one) as rank:
        loss = rank.gradient(0)["loss"]
        gradients = _gradients(rank)
        rank.train_step(0)
        weights = _copied(rank, lambda weight: weight)
        before += sum(t.nbytes for t in (*gradients.values(), *weights.values()))
        for step in range(1, steps):
            if rank.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rank.train_step(step)
        return loss, rank.peak_memory() - before, gradients, weights


def _gradients(rank: Rank) -> dict[str, Tensor]:
    return _copied(rank, lambda weight: getattr(weight, "main_grad", weight))


@torch.no_grad()
def _copied(rank: Rank, value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return copies of the rank's tensors. value: maps a weight to what is copied."""
    found = hf_tensors(rank.chunks, rank.recipe.model, value)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found}


def check_ranks(bench: Bench, recipe: Recipe, folder: Path, beside: subprocess.Popen) -> Iterator[Outcome]:
    """Train one step in three layouts, and compare gradients and weights tensor by tensor: with each other, and with the CPU's in
    fp32. Compare each layout's peak memory with the plan. beside: the process of `start_cpu_rank`, in `folder`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, words in LAYOUTS.items():
        one = planned(bench, recipe, words)
        loss, peak, gradients, weights = trained(one, steps=2)
        found[name] = weights | {f"gradient of {n}": tensor for n, tensor in gradients.items()}
        if bench.on_gpu:
            off = one.allocated / peak - 1
            said = f"loss {loss:.5f}, peak {peak / 1e9:.2f} GB, {one.allocated / 1e9:.2f} by the plan, {off:+.1%}"
            yield Outcome(f"memory of '{name}'", said, abs(off) <= OFF, {"off": off})
    first, *others = found
    for other in others:
        yield _compared(f"'{other}' beside '{first}'", found[other], found[first], SAME)
    status = beside.wait(timeout=180)
    if status:
        lines = (folder / "log").read_text(encoding="utf-8").splitlines()[-1:]
        yield Outcome("gradients beside fp32 on the CPU", f"its process ended with {status}: {' '.join(lines)}", False)
        return
    exact = {f"gradient of {n}": tensor for n, tensor in load_file(folder / "gradients.safetensors").items()}
    exact = {n: tensor.to(bench.device) for n, tensor in exact.items()}
    yield _compared("gradients beside fp32 on the CPU", {n: found[first][n] for n in exact}, exact, BESIDE_FP32)


def check_checkpoint(bench: Bench, recipe: Recipe, folder: Path) -> Iterator[Outcome]:
    """Save after one step in one layout and go on in another: the next step has the loss of the run that did not stop."""
    first, second = (
        planned(bench, recipe, f"{LAYOUTS[name]} model.layers=1 model.vocab=4096")
        for name in ("nothing again", "all offloaded")
    )
    target = folder / "checkpoint"
    target.mkdir()
    started = time.monotonic()
    with rank_of(first) as rank:
        built, started = time.monotonic() - started, time.monotonic()
        rank.train_step(0)
        stepped, started = time.monotonic() - started, time.monotonic()
        rank.save(str(target), 1)
        saved = time.monotonic() - started
        wanted = rank.train_step(1)["loss"]
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    with rank_of(second) as rank:
        started = time.monotonic()
        done = rank.load(str(target))
        loaded = time.monotonic() - started
        loss = rank.train_step(1)["loss"]
    figure = (
        f"built in {built:.1f} s, first step {stepped:.1f} s; {size / 1e9:.1f} GB saved in {saved:.1f} s and loaded in "
        f"{loaded:.1f} s; loss {loss:.6f} and {wanted:.6f}"
    )
    yield Outcome("going on from a checkpoint", figure, done == 1 and loss == wanted)


def check_experts(bench: Bench, recipe: Recipe) -> Iterator[Outcome]:
    """Train two steps of a small mixture of experts on the same sequences: the loss falls."""
    one = planned(bench, recipe, f"{LAYOUTS['nothing again']} layout.ep=1", "model=glm4.5-tiny optim.warmup_steps=0")
    with rank_of(one) as rank:
        first, second = (rank.train_step(step)["loss"] for step in range(2))
    yield Outcome("a mixture of experts", f"loss {first:.4f}, after a step {second:.4f}", second < first)


def _compared(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> Outcome:
    errors = {n: relative(found[n], wanted[n]) for n in wanted}
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    same = sum(torch.equal(found[n].float(), wanted[n].float()) for n in wanted)
    said = f"{errors[worst]:.1e} at most, in {worst}; {same} of {len(wanted)} tensors bit for bit"
    return Outcome(name, said, errors[worst] < limit and found.keys() == wanted.keys(), errors)
