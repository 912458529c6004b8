"""`make parity`: compares the tiny models in every layout that this engine accepts with training on one rank.

Each comparison trains five fp32 steps on the same packed batches. It compares the loss and gradient norm of every step, every
gradient tensor of the first step, and every weight after the last step. It compares the losses once more with the recipe's own Adam.
The weights are compared with Adam's eps at 1e-4. With 1e-8, rounding noise would become full-size updates if the exact gradient is
zero, as in the unrotated half of GLM's key bias.

In bf16, rounding depends on the order of sums. So one rank in bf16 is compared with fp32, and some layouts with bf16 on one rank.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from data_prep.pack.dataset import prepare
from launch.megatron.ranks import Pool
from launch.run.run_plan import Plan
from launch.weights import tiny
from recipes.compose.recipe import compose_recipe
from recipes.config import Recipe
from recipes.errors import TrainError

STEPS = 5
EPS = "optim.eps=1e-4"


@dataclass(frozen=True)
class Limits:
    """The largest `Difference` that is accepted."""

    loss: float
    norm: float
    gradient: float
    weight: float


FP32 = Limits(loss=1e-5, norm=1e-4, gradient=1e-4, weight=1e-4)
# Two to three times the largest measured difference. GLM's limits are wider, because rounding occasionally routes a token to another
# expert. For comparison: if experts are not reduced over their ranks, gradients differ by 0.5.
BF16_QWEN = Limits(loss=6e-3, norm=4e-2, gradient=6e-2, weight=4e-2)
BF16_GLM = Limits(loss=1.2e-2, norm=4e-2, gradient=1.2e-1, weight=4e-2)
# Both tiny models: four layers, so that pipelines can split them, and no warm-up, so that updates are large.
COMMON = ["model.layers=4", "optim.warmup_steps=0"]
QWEN, UNTIED, GLM = (
    ["model=qwen3-tiny"],
    ["model=qwen3-tiny", "model.tied=false"],
    ["model=glm4.5-tiny", "layout=data_parallel"],
)
# On one rank a step is one micro-batch, unless a row limits its tokens. The smallest limit is the longest sequence's tokens.
_SP, _EP = "layout.tp=2 layout.sp=true", "layout.ep=2"
# Name: overrides of the model, ranks, overrides of the layout.
LAYOUTS: dict[str, tuple[list[str], int, str]] = {
    "Qwen3 DP2": (QWEN, 2, ""),
    "Qwen3 DP4": (QWEN, 4, ""),
    "Qwen3 TP2": (QWEN, 2, "layout.tp=2"),
    "Qwen3 TP2 SP": (QWEN, 2, _SP),
    "Qwen3 PP2": (QWEN, 2, "layout.pp=2"),
    "Qwen3 PP4": (QWEN, 4, "layout.pp=4"),
    "Qwen3 PP2 of 1 and 3 layers": (QWEN, 2, "layout.pp=2 layout.first_stage_layers=1"),
    "Qwen3 PP2 VPP2": (QWEN, 2, "layout.pp=2 layout.vpp=2"),
    "Qwen3 CP2": (QWEN, 2, "layout.cp=2"),
    "Qwen3 CP4": (QWEN, 4, "layout.cp=4"),
    "Qwen3 TP2 SP DP2": (QWEN, 4, _SP),
    "Qwen3 TP2 PP2": (QWEN, 4, "layout.tp=2 layout.pp=2"),
    "Qwen3 CP2 TP2 SP": (QWEN, 4, f"layout.cp=2 {_SP}"),
    "Qwen3 CP2 PP2": (QWEN, 4, "layout.cp=2 layout.pp=2"),
    "Qwen3 CP2 DP2": (QWEN, 4, "layout.cp=2"),
    "Qwen3 TP2 PP2 CP2": (QWEN, 8, "layout.tp=2 layout.pp=2 layout.cp=2"),
    "Qwen3 full recomputation": (QWEN, 1, "layout.recompute=full"),
    "Qwen3 selective recomputation": (QWEN, 1, "layout.recompute=selective"),
    "Qwen3 linear recomputation": (QWEN, 1, "layout.recompute=linear"),
    "Qwen3 linear recomputation, offloaded": (QWEN, 1, "layout.recompute=linear layout.offload=true"),
    "Qwen3 full recomputation, offloaded": (QWEN, 1, "layout.recompute=full layout.offload=true"),
    "Qwen3 offloaded optimizer": (QWEN, 1, "layout.optimizer_state=offloaded"),
    "Qwen3 loss in chunks": (QWEN, 1, "layout.loss_chunk=1000"),
    "Qwen3 TP2 loss in chunks": (QWEN, 2, "layout.tp=2 layout.loss_chunk=300"),
    "Qwen3 untied TP2 SP loss in chunks": (UNTIED, 2, f"{_SP} layout.loss_chunk=300"),
    "Qwen3 CP2 PP2 loss in chunks": (QWEN, 4, "layout.cp=2 layout.pp=2 layout.loss_chunk=64"),
    "Qwen3 smallest micro-batches": (QWEN, 1, "layout.max_tokens_per_gpu=1784"),
    "Qwen3 untied PP2": (UNTIED, 2, "layout.pp=2"),
    "Qwen3 untied TP2 SP": (UNTIED, 2, _SP),
    "GLM DP2": (GLM, 2, ""),
    "GLM EP2": (GLM, 2, _EP),
    "GLM EP4": (GLM, 4, "layout.ep=4"),
    "GLM PP2": (GLM, 2, "layout.pp=2"),
    "GLM PP4": (GLM, 4, "layout.pp=4"),
    "GLM EP2 PP2": (GLM, 4, f"{_EP} layout.pp=2"),
    "GLM DP2 EP2 PP2": (GLM, 8, f"{_EP} layout.pp=2"),
    "GLM CP2 EP2": (GLM, 2, f"layout.cp=2 {_EP}"),
    "GLM TP2 SP EP2": (GLM, 2, f"{_SP} {_EP}"),
    "GLM TP2 SP": (GLM, 2, _SP),
    "GLM TP2 SP DP2": (GLM, 4, _SP),
    "GLM TP2 SP CP2 ETP4": (GLM, 4, f"{_SP} layout.cp=2 layout.etp=4"),
    "GLM TP2 SP ETP2": (GLM, 2, f"{_SP} layout.etp=2"),
    "GLM TP2 SP DP2 EP4": (GLM, 4, f"{_SP} layout.ep=4"),
    "GLM TP2 SP CP2 EP2": (GLM, 4, f"{_SP} layout.cp=2 {_EP}"),
    "GLM smallest micro-batches": (GLM, 1, "layout.max_tokens_per_gpu=1538"),
    "GLM EP2 full recomputation": (GLM, 2, f"{_EP} layout.recompute=full"),
    "GLM EP2 loss in chunks": (GLM, 2, f"{_EP} layout.loss_chunk=512"),
    "GLM EP2 selective recomputation": (GLM, 2, f"{_EP} layout.recompute=selective"),
    "GLM TP2 SP CP2 linear recomputation, all offloaded": (
        GLM,
        4,
        f"{_SP} layout.cp=2 layout.recompute=linear layout.offload=true layout.optimizer_state=offloaded",
    ),
    "Qwen3 PP2 VPP2 linear recomputation, all offloaded": (
        QWEN,
        2,
        "layout.pp=2 layout.vpp=2 layout.recompute=linear layout.offload=true layout.optimizer_state=offloaded",
    ),
}
BF16_LAYOUTS = {
    "Qwen3 DP2": BF16_QWEN,
    "Qwen3 TP2 SP": BF16_QWEN,
    "Qwen3 PP2": BF16_QWEN,
    "Qwen3 CP2": BF16_QWEN,
    "Qwen3 full recomputation": BF16_QWEN,
    "Qwen3 linear recomputation, offloaded": BF16_QWEN,
    "Qwen3 offloaded optimizer": BF16_QWEN,
    "Qwen3 TP2 loss in chunks": BF16_QWEN,
    "GLM EP2": BF16_GLM,
    "GLM TP2 SP EP2": BF16_GLM,
    "GLM EP2 full recomputation": BF16_GLM,
}
_BF16 = "engine.dtype=bf16"


@dataclass(frozen=True)
class Run:
    """The results of five steps: each step's loss and gradient norm, and tensors by Hugging Face name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest differences from one rank.

    Losses differ by an absolute amount, gradient norms relatively. Tensors differ relative to their norm, and come with the tensor's
    name. own_loss: the loss difference with the recipe's own Adam.
    """

    loss: float
    norm: float
    gradient: tuple[float, str]
    weight: tuple[float, str]
    own_loss: float

    def within(self, limits: Limits) -> bool:
        return (
            max(self.loss, self.own_loss) <= limits.loss
            and self.norm <= limits.norm
            and self.gradient[0] <= limits.gradient
            and self.weight[0] <= limits.weight
        )


def words_of(name: str) -> list[str]:
    """Return the overrides of a layout."""
    model, ranks, words = LAYOUTS[name]
    return [*model, *COMMON, f"cluster.gpus_per_node={ranks}", *words.split()]


def one_rank(pool: Pool, root: Path, model: list[str], *words: str) -> Run:
    return train_layout(pool, root, [*model, *COMMON, "cluster.gpus_per_node=1", *words])


def train_layout(pool: Pool, root: Path, words: list[str]) -> Run:
    """Train five steps. Runs share the base model and the data under `root`."""
    recipe = compose_recipe([f"cluster.root={root}", *words])
    checkpoint = f"{root}/models/{recipe.model.name}-{'tied' if recipe.model.tied else 'untied'}"
    recipe = compose_recipe([f"cluster.root={root}", *words, f"model.checkpoint={checkpoint}"])
    tiny.make(recipe)
    data, heldout = prepare(recipe, recipe.data.path), prepare(recipe, str(recipe.data.heldout))
    plan = Plan(recipe, data, heldout)
    with pool.ranks(plan) as ranks, tempfile.TemporaryDirectory(dir=root) as scratch:
        folders = {name: Path(scratch) / name for name in ("gradients", "weights")}
        for folder in folders.values():
            folder.mkdir()
        steps = [ranks.call("train_step", 0)[0]]
        ranks.call("write_gradients", str(folders["gradients"]))
        steps += [ranks.call("train_step", step)[0] for step in range(1, STEPS)]
        ranks.call("export", str(folders["weights"]))
        tensors = {
            name: {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
            for name, folder in folders.items()
        }
    return Run([s["loss"] for s in steps], [s["grad_norm"] for s in steps], **tensors)


def difference(run: Run, own: Run, one: Run, own_one: Run) -> Difference:
    """Compare runs. run, one: in a layout and on one rank, with Adam's eps at 1e-4. own, own_one: the same with the recipe's own
    Adam."""
    return Difference(
        loss=_largest(run.losses, one.losses),
        norm=max(abs(x - y) / y for x, y in zip(run.norms, one.norms, strict=True)),
        gradient=_tensors(run.gradients, one.gradients),
        weight=_tensors(run.weights, one.weights),
        own_loss=_largest(own.losses, own_one.losses),
    )


def _largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of two tensors, and its name. Raise `KeyError` if the names are not the same."""
    if a.keys() != b.keys():
        raise KeyError(f"tensors in one only: {sorted(a.keys() ^ b.keys())[:5]}")
    return max((float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)), n) for n in b)


def _by_ranks(names: Iterable[str]) -> list[str]:
    """Sort layouts by their number of ranks, so that the pool can reuse its processes."""
    return sorted(names, key=lambda name: LAYOUTS[name][1])


def compared(pool: Pool, root: Path, names: Iterable[str]) -> Iterator[tuple[str, int, Difference, Limits]]:
    """Yield the name, ranks, difference and limits of each layout as soon as they are known. The reference on one rank is trained once
    per model."""
    reference: dict[str, tuple[Run, Run]] = {}
    for name in _by_ranks(names):
        model, ranks, _ = LAYOUTS[name]
        key = " ".join(model)
        if key not in reference:
            reference[key] = one_rank(pool, root, model, EPS), one_rank(pool, root, model)
        words = words_of(name)
        run, own = train_layout(pool, root, [*words, EPS]), train_layout(pool, root, words)
        yield name, ranks, difference(run, own, *reference[key]), FP32


def compared_bf16(pool: Pool, root: Path, names: Iterable[str]) -> Iterator[tuple[str, int, Difference, Limits]]:
    """Yield what `compared` yields, in bf16 and without the recipe's own Adam. For each model, first compare one rank in bf16 with
    fp32."""
    reference: dict[str, Run] = {}
    for name in _by_ranks(names):
        model, ranks, _ = LAYOUTS[name]
        key, limits = model[0], BF16_LAYOUTS[name]
        if key not in reference:
            one, exact = one_rank(pool, root, model, EPS, _BF16), one_rank(pool, root, model, EPS)
            reference[key] = one
            yield f"{name.split()[0]} one rank, beside fp32", 1, difference(one, one, exact, exact), limits
        run, one = train_layout(pool, root, [*words_of(name), EPS, _BF16]), reference[key]
        yield name, ranks, difference(run, run, one, one), limits


def show_parity(_: Recipe, console: Console) -> None:
    """Print both tables row by row. Raise `TrainError` if a layout differs by more than its limits."""
    with tempfile.TemporaryDirectory() as folder, Pool() as pool:
        root = Path(folder)
        failed = _table(console, "layout", True, compared(pool, root, LAYOUTS))
        failed += _table(console, "bf16", False, compared_bf16(pool, root, BF16_LAYOUTS))
    if failed:
        raise TrainError(f"{len(failed)} layouts train differently from one rank: {'; '.join(failed)}")


def _table(console: Console, title: str, own: bool, rows: Iterator[tuple[str, int, Difference, Limits]]) -> list[str]:
    """Print a table. Return the layouts that failed. own: whether to show the losses with the recipe's own Adam."""
    head = f"| {title} | ranks | loss | gradient norm | gradients | weights |{' loss, own Adam |' if own else ''}"
    console.print(f"{head}\n{'|---' * (head.count('|') - 1)}|")
    failed = []
    for name, ranks, d, limits in rows:
        figures = [d.loss, d.norm, d.gradient[0], d.weight[0], *([d.own_loss] if own else [])]
        console.print(f"| {name} | {ranks} | {' | '.join(f'{x:.1e}' for x in figures)} |")
        if not d.within(limits):
            failed.append(f"{name} ({d.gradient[1]}, {d.weight[1]})")
    console.print()
    return failed
