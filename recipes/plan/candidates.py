"""Candidate layouts of `layout=auto`: every legal combination of parallel degrees on a cluster's GPUs."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from recipes.config import EngineName, Layout, OptimizerState, Recipe, Recompute
from recipes.layout import batch_multiple, faults, round_up, world_size

CAP_MULTIPLE = 1024  # tokens; the cap of a micro-batch is a multiple of it
VPPS = (1, 2, 4)
MOST_CP = 64


def topologies(r: Recipe, longest: int, smallest: int) -> Iterator[Recipe]:
    """Yield the recipe with every legal combination of degrees on the cluster's GPUs.

    Fields in `layout.fixed` keep their values. Recomputation and offload are the leanest allowed. The optimizer state is
    unchanged. longest: tokens of the longest sequence. smallest: sequences of the smallest step.
    """
    again, offload = (recompute_options(r) or [(r.layout.recompute, r.layout.offload)])[-1]
    for layout in _degrees(r, longest, smallest):
        one = replace(r, layout=replace(layout, recompute=again, offload=offload))
        if next(faults(one), None) is not None:
            continue
        yield one


def values_of(r: Recipe, name: str, values: Sequence) -> list:
    """Return the values that a layout field may take: only its own value if the command line fixed it."""
    return [getattr(r.layout, name)] if name in r.layout.fixed else [*values]


def states_of(r: Recipe) -> list[OptimizerState]:
    """Return the optimizer states that the engine supports. Precision-aware states need Transformer Engine, so slime."""
    slime = r.engine.name is EngineName.slime
    return [*OptimizerState] if slime else [OptimizerState.resident, OptimizerState.offloaded]


def recompute_options(r: Recipe) -> list[tuple[Recompute, bool]]:
    """Return the allowed pairs (recomputation, offload of what it saves), from the fastest to the leanest."""
    again = [(Recompute.none, False), (Recompute.selective, False), (Recompute.full, False)]
    if r.engine.name is EngineName.megatron:
        linear = [(Recompute.linear, False), (Recompute.linear, True)]
        again = [*again[:2], *linear, *again[2:], (Recompute.full, True)]
    hows, offloads = values_of(r, "recompute", [*Recompute]), values_of(r, "offload", (False, True))
    return [(how, offload) for how, offload in again if how in hows and offload in offloads]


def _degrees(r: Recipe, longest: int, smallest: int) -> Iterator[Layout]:
    m, world = r.model, world_size(r)
    tps = [t for t in range(1, r.cluster.gpus_per_node + 1) if world % t == 0 and m.kv_heads % t == 0]
    cps = [c for c in range(1, MOST_CP + 1) if world % c == 0]
    pps = [n for n in range(1, world + 1) if world % n == 0 and n <= m.layers]
    for tp, cp, pp in itertools.product(values_of(r, "tp", tps), values_of(r, "cp", cps), values_of(r, "pp", pps)):
        if world % (tp * cp * pp):
            continue
        dp = world // (tp * cp * pp)
        if smallest < dp or ("dp" in r.layout.fixed and dp != r.layout.dp):
            continue
        whole = round_up(round_up(longest, 2 * cp), batch_multiple(replace(r.layout, tp=tp, cp=cp), r.engine.name))
        cap = r.layout.max_tokens_per_gpu
        if "max_tokens_per_gpu" not in r.layout.fixed:
            cap = round_up(-(-whole // cp), CAP_MULTIPLE)
        if whole > cap * cp:
            continue
        base = replace(
            r.layout, search=False, tp=tp, sp=tp > 1 if "sp" not in r.layout.fixed else r.layout.sp, cp=cp, pp=pp,
            dp=None, max_tokens_per_gpu=cap,
        )  # fmt: skip
        for (first, last), vpp in itertools.product(_splits(r, pp), values_of(r, "vpp", VPPS)):
            if vpp > 1 and (pp == 1 or smallest < pp * dp):
                continue
            for ep, etp in _expert_degrees(r, world // pp, tp):
                yield replace(base, first_stage_layers=first, last_stage_layers=last, vpp=vpp, ep=ep, etp=etp)


def _splits(r: Recipe, pp: int) -> list[tuple[int | None, int | None]]:
    """Return pairs (layers of the first stage, layers of the last stage); None means as many as the middle stages.

    Some pairs give the ends fewer layers, because the last stage also has the output layer.
    """
    fixed = {"first_stage_layers", "last_stage_layers"} & {*r.layout.fixed}
    if fixed or pp == 1:
        return [(r.layout.first_stage_layers, r.layout.last_stage_layers)]
    layers = r.model.layers
    splits: list[tuple[int | None, int | None]] = [(None, None)] if layers % pp == 0 else []
    for others in range(layers // pp, layers // pp + 3):
        if 0 < (last := layers - others * (pp - 1)) < others:
            splits.append((None, last))
        ends = layers - others * (pp - 2)
        if pp > 2 and 0 < ends // 2 < others:
            splits.append((ends - ends // 2, ends // 2))
    return splits


def _expert_degrees(r: Recipe, ranks: int, tp: int) -> list[tuple[int, int]]:
    if not r.model.experts:
        return [(r.layout.ep, r.layout.etp)]
    eps = [e for e in range(1, ranks + 1) if ranks % e == 0 and r.model.experts % e == 0]
    return [
        (ep, etp)
        for ep, etp in itertools.product(values_of(r, "ep", eps), values_of(r, "etp", (1, tp) if tp > 1 else (1,)))
        if ranks % (ep * etp) == 0
    ]
