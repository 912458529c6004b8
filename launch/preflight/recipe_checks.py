"""Checks before anything starts, without a cluster: recipe, checkpoint, data, memory and disk space.

slime does not check most of this: it trains on silently, or fails hours later while holding the GPUs.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.source_files import is_hub_id
from launch.checks import Check
from launch.preflight import checkpoint_checks as checkpoint
from launch.preflight.checklist import Found, check
from launch.preflight.machine import machine
from launch.run.fetch_models import is_remote
from launch.run.run_folder import held
from recipes.config import EngineName, Recipe
from recipes.context import check_context, reach
from recipes.errors import ConfigError, PreflightError
from recipes.layout import data_parallel, faults, fix, world_size
from recipes.paths import in_ray_job
from recipes.plan import planner
from recipes.plan.memory import Verdict, memory_limit, verdict
from recipes.plan.planner import RunPlan
from recipes.plan.saves import saves
from recipes.plan.search import Sequences
from recipes.plan.serving import described, longest_context, servers
from recipes.plan.shown.plan_words import degrees, degrees_of, gigabytes
from recipes.schedule.fill_ranks import remedy

if TYPE_CHECKING:
    from data_prep.pack.dataset import Dataset

_MANY_STEPS = 10_000  # of a run whose steps are not known, so that it fills engine.keep_last
Pack = Callable[[], dict[str, "Dataset"]]


@dataclass
class Known:
    """Results of one check that later checks need; None if the check failed."""

    packed: dict[str, "Dataset"] | None = None
    sequences: Sequences | None = None  # all within the model's context
    settled: RunPlan | None = None  # a plan with a legal layout
    capped: RunPlan | None = None  # a plan whose sequences can be put into micro-batches
    spread: RunPlan | None = None  # a plan whose steps give every rank a sequence


def recipe_rows(r: Recipe, pack: Pack, able: Check | None = None) -> list[Check]:
    """Return the rows of all checks of the recipe, in order: later checks use results of earlier ones.

    pack: returns the data sets by name, including `training`. able: the row of `machine`, if it was already checked.
    """
    known, able = Known(), able or machine(r)
    # A run that cannot start here must not be told to fetch its model.
    elsewhere = able.failed and is_remote(r.model.checkpoint)
    found = [
        able,
        paths(r),
        warmup_once(r),
        *([flags(r)] if r.engine.name is EngineName.slime else []),
        data(r, known, None if elsewhere else pack),
        *checkpoint.checkpoint_rows(None if elsewhere else r),
        checkpoint.code(None if elsewhere else checkpoint.folder(r)),
        checkpoint.tokenizer(r, known.packed),
        supervision(known.packed),
        context(r, known, known.packed),
        layout(r, known),
        cap(known, known.settled),
        steps(known, known.capped),
        memory(known.spread),
        host(known.spread),
        room(r, known),
        server(r),
    ]
    refused = {row.name for row in found if row.failed}
    odd = [row for row in oddities(known.spread) if row.name not in refused]
    said = {row.name for row in odd}
    return [*(row for row in found if row.name not in said), *odd]


def oddities(plan: RunPlan | None) -> list[Check]:
    """Return one row per warning of `make plan`; none if there is no plan."""
    return [_odd(one.name)(one) for one in planner.warnings(plan)] if plan is not None else []


def _odd(name: str) -> Callable[..., Check]:
    @check(name, "days of training that was not meant that way")
    def row(one: planner.Oddity) -> Found:
        return Found(one.problem, fix=one.fix, odd=True)

    return row


@check("paths", "relative paths, which a Ray job resolves in its own copy of the checkout")
def paths(r: Recipe) -> Found:
    found = {"model.checkpoint": r.model.checkpoint, "data.path": r.data.path, "data.heldout": r.data.heldout}
    named = {name: path for name, path in found.items() if path and not (is_hub_id(path) and not Path(path).exists())}
    named |= {"cluster.root": r.cluster.root, "data.out": r.data.out}
    relative = {name: path for name, path in named.items() if not os.path.isabs(path)}
    if not relative:
        return Found("absolute", "absolute in a Ray job")
    text = " ".join(f"{name}={path}" for name, path in relative.items())
    if not in_ray_job():
        return Found(f"{text}, from this folder: not in a Ray job", "absolute in a Ray job")
    fix = " ".join(f"{name}=/FOLDER/{Path(path).name}" for name, path in relative.items())
    return Found(text, "absolute in a Ray job", f"write {fix}, on a file system that every node sees")


@check("warm-up", "a warm-up setting that another one silently overrides")
def warmup_once(r: Recipe) -> Found:
    optim = r.optim
    passed = [f"engine.args.{name}" for name in r.engine.args if name.replace("-", "_").startswith("lr_warmup")]
    typed = [word for word in r.overrides if word.startswith("optim.warmup_steps=")]
    own = f"warmup_steps {optim.warmup_steps}" if optim.warmup_fraction is None else f"fraction {optim.warmup_fraction}"
    if passed:
        return Found(
            f"{', '.join(passed)} in addition to {own}",
            "one",
            f"leave out {' '.join(passed)} and write optim.warmup_steps=N or optim.warmup_fraction=X",
        )
    if typed and optim.warmup_fraction is not None:
        return Found(
            f"{typed[-1]} in addition to optim.warmup_fraction={optim.warmup_fraction:g}, which overrides it",
            "one",
            "write optim.warmup_fraction=null, or leave out optim.warmup_steps",
        )
    return Found(own, "one")


@check("flags", "a misspelt flag, which slime accepts silently")
def flags(r: Recipe) -> Found:
    from launch.slime.arguments import arguments

    wrong = []
    for name, value in r.engine.args.items():
        try:
            arguments(replace(r, engine=replace(r.engine, args={name: value})), 1, r.model.checkpoint)
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        return Found("\n".join(w.problem for w in wrong), "slime's", "; ".join(w.fix for w in wrong))
    count = sum(word.startswith("--") for word in arguments(r, 1, r.model.checkpoint))
    return Found(f"{count} flags, {len(r.engine.args)} of them passed on", "slime's and Megatron-LM's")


@check("data", "trajectories that cannot be read, or whose loss masks cannot be proved")
def data(r: Recipe, known: Known, pack: Pack) -> Found:
    packed = pack()
    known.packed = packed
    text = ", ".join(f"{name}: {len(one.ids):,} sequences" for name, one in packed.items())
    return Found(text, f"{r.data.max_rejected} rejected")


@check("supervised tokens", "a loss that counts one token too many, or a prediction made for the neighbouring sequence")
def supervision(packed: dict[str, "Dataset"]) -> Found:
    none, first, count = [], [], 0
    for one in packed.values():
        for sequence, name in enumerate(one.ids):
            spans = one.spans(sequence)
            count += sum(end - start for start, end in spans)
            if not spans:
                none.append(name)
            elif spans[0][0] == 0:
                first.append(name)
    limit = "some in every sequence, not its first"
    if none or first:
        text = [f"none in {_listed(none)}"] * bool(none) + [f"the first token in {_listed(first)}"] * bool(first)
        return Found(", ".join(text), limit, "leave these out of data.path and data.heldout, or write data.turns=all")
    return Found(f"{count:,}", limit)


@check("context", "positions that the model never saw")
def context(r: Recipe, known: Known, packed: dict[str, "Dataset"]) -> Found:
    training = packed["training"]
    longest = max(training.lengths)
    check_context(r.model, longest)
    known.sequences = Sequences(training.trajectory, training.lengths, f"packed from {r.data.path}")
    limit = f"{reach(r.model):,} tokens, positions {r.model.rope.value}"
    return Found(f"the longest sequence has {longest:,} tokens", limit)


@check("layout", "a layout that cannot run, or that trains wrongly without an error")
def layout(r: Recipe, known: Known) -> Found:
    limit = f"{world_size(r)} ranks"
    if not r.layout.search and (wrong := [*faults(r)]):
        return Found("\n".join(one.problem for one in wrong), limit, fix(r))
    if known.sequences is None:
        if r.layout.search:
            return Found("searched for once data and context are right", limit, judged=False)
        return Found(degrees(degrees_of(r)), limit)
    plan = planner.make_plan(r, known.sequences)
    known.settled = plan
    return Found(degrees(degrees_of(plan.recipe)), limit)


@check("micro-batches", "a sequence longer than the cap, which needs more memory than the cap was meant to allow")
def cap(known: Known, plan: RunPlan) -> Found:
    p, lengths = plan.recipe.layout, plan.sequences.lengths
    most = p.max_tokens_per_gpu * p.cp
    longest = max(lengths)
    _ = plan.schedule  # raises `ConfigError` if padding makes the longest sequence exceed the cap
    known.capped = plan
    limit = f"{most:,} tokens (layout.max_tokens_per_gpu {p.max_tokens_per_gpu:,} x cp {p.cp})"
    if above := sum(n > most for n in lengths):
        return Found(
            f"{above} of {len(lengths)} sequences exceed it and run alone; memory includes them", limit, judged=False
        )
    return Found(f"the longest has {longest:,} tokens", limit)


@check("steps", "ranks without a sequence, on which slime stops with an assertion in the middle of a run")
def steps(known: Known, plan: RunPlan) -> Found:
    dp = data_parallel(plan.recipe)
    limit = f"{dp} data-parallel ranks"
    try:
        sizes = [len(step.sequences) for step in plan.steps]
    except ConfigError as error:
        return Found(error.problem, limit, remedy(plan.recipe, plan.schedule))
    known.spread = plan
    return Found(f"{len(sizes)} steps of {min(sizes)} to {max(sizes)} sequences", limit)


@check("GPU memory", "running out of memory hours into a run")
def memory(plan: RunPlan) -> Found:
    totals, limit = [stage.total for stage in plan.memory], memory_limit(plan.recipe)
    peak = max(totals)
    text = f"{gigabytes(peak)} GB on the fullest rank, of stage {totals.index(peak)}: {verdict(peak, limit).value}"
    fits = verdict(peak, limit) is not Verdict.does_not_fit
    return Found(text, f"{gigabytes(limit)} GB", "" if fits else _fitting(plan))


@check("host memory", "nodes that run out of memory by the optimizer on the host or by Ray's object store")
def host(plan: RunPlan) -> Found:
    needed, there = plan.host.total, plan.recipe.cluster.host_memory_gb
    if there is None:
        return Found(f"{gigabytes(needed)} GB a node", "cluster.host_memory_gb is not set", judged=False)
    fits = verdict(needed, there * 1e9)
    text = f"{gigabytes(needed)} GB a node: {fits.value}"
    return Found(text, f"{there:,.0f} GB", "" if fits is not Verdict.does_not_fit else _fitting(plan))


def _fitting(plan: RunPlan) -> str:
    """Return the planner's fix for a plan that does not fit."""
    try:
        planner.refuse_too_large(plan)
    except ConfigError as error:
        return error.fix
    raise AssertionError("a plan that does not fit is not refused")


@check("disk", "a run that stops because a checkpoint cannot be written")
def room(r: Recipe, known: Known) -> Found:
    root = Path(r.cluster.root)
    there = next(folder for folder in (root, *root.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    steps = _MANY_STEPS if known.spread is None else len(known.spread.steps)
    planned = saves(r, steps)
    text = f"{gigabytes(free)} GB free"
    if own := held(r):
        free += own
        text += f", and {gigabytes(own)} GB held by this run"
    kept = min(planned.count, r.engine.keep_last)
    limit = f"{gigabytes(planned.most)} GB: {kept} checkpoint{'s' if kept > 1 else ''} kept, one being written, and the export"
    if free >= planned.most:
        return Found(text, limit)
    fewer = [n for n in range(kept - 1, 0, -1) if saves(_keeping(r, n), steps).most <= free]
    keep = f"write engine.keep_last={fewer[0]}, " if fewer else ""
    return Found(text, limit, f"{keep}make room in {there}, or write cluster.root=FOLDER on another disk")


def _keeping(r: Recipe, checkpoints: int) -> Recipe:
    return replace(r, engine=replace(r.engine, keep_last=checkpoints))


@check("server", "a trained model that no server of this cluster holds, so that only its files are checked")
def server(r: Recipe) -> Found:
    if r.gpu.memory_mib is None or r.sanity.url is not None:
        return Found(r.sanity.url or "SGLang on this machine's cores")
    try:
        found = servers(r, longest_context(r, r.model.max_position))
    except PreflightError as error:
        return Found(error.problem, fix=error.fix, odd=True)
    text = described(r, found)
    if found.nodes > 1 and r.cluster.address is None and not in_ray_job():
        fix = "write cluster.address=http://HEAD:8265, or start SGLang over these nodes and write its sanity.url=http://HOST:PORT"
        return Found(text, "one node", fix, odd=True)
    return Found(text, f"{r.cluster.nodes} x {r.cluster.gpus_per_node}")


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
