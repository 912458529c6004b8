"""The rules of a parallel layout: what Megatron can run, and what it runs incorrectly without an error.

World size = dp x tp x pp x cp. Experts have their own grid over the same ranks: edp x ep x etp x pp, where edp is the number of
ranks that hold the same experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from recipes.config import Dtype, EngineName, Layout, Model, OptimizerState, Recipe, Recompute
from recipes.errors import ConfigError

Changes = dict[str, Any]  # new values of options by name, such as "layout.tp"; "engine" stands for the engine's group
_ROUNDS = 6  # most rounds of further changes that one change may need


def world_size(r: Recipe) -> int:
    """Return the number of ranks of the run, one per GPU (or per core)."""
    return r.cluster.nodes * r.cluster.gpus_per_node


def model_parallel(layout: Layout) -> int:
    """Return the number of ranks that together hold one copy of the activations: tp x pp x cp."""
    return layout.tp * layout.pp * layout.cp


def data_parallel(r: Recipe) -> int:
    """Return the number of ranks that train on different sequences: world size / (tp x pp x cp)."""
    return world_size(r) // model_parallel(r.layout)


def sequence_multiple(layout: Layout) -> int:
    """Return the multiple of tokens that a sequence is padded to. Zigzag context parallelism cuts it into 2 x cp chunks."""
    return 2 * layout.cp if layout.cp > 1 else 1


def batch_multiple(p: Layout, engine: EngineName) -> int:
    """Return the multiple of tokens that a micro-batch is padded to.

    Sequence parallelism cuts each rank's share into tp parts. slime pads each rank's share to 128 x tp.
    """
    if engine is EngineName.slime:
        return 128 * p.tp * p.cp
    return p.tp * sequence_multiple(p) if p.sp else sequence_multiple(p)


def micro_batch_multiple(layout: Layout) -> int:
    """Return the divisor of a rank's number of micro-batches. The interleaved pipeline schedule runs them pp at a time."""
    return layout.pp if layout.vpp > 1 else 1


def stage_layers(m: Model, p: Layout) -> list[list[range]]:
    """Return the layers of every pipeline stage: a range for each of its vpp chunks, counted from 0. The layout must be legal."""
    if p.vpp > 1:
        size = m.layers // (p.pp * p.vpp)
        return [
            [range(start, start + size) for start in range(stage * size, m.layers, p.pp * size)]
            for stage in range(p.pp)
        ]
    counts: list[int | None] = [None] * p.pp
    counts[0], counts[-1] = p.first_stage_layers, p.last_stage_layers or (p.first_stage_layers if p.pp == 1 else None)
    left, middle = m.layers - sum(c or 0 for c in counts), counts.count(None)
    stages, start = [], 0
    for count in counts:
        end = start + (left // middle if count is None else count)
        stages.append([range(start, end)])
        start = end
    return stages


@dataclass(frozen=True)
class Wrong:
    """A rule that a layout breaks."""

    problem: str
    ways: tuple[Changes, ...] = ()  # alternative changes of options; each is the smallest that satisfies the rule
    otherwise: str = ""  # the fix if no change of a layout helps


def check_layout(r: Recipe) -> None:
    """Raise `ConfigError` if a layout cannot run or Megatron runs it incorrectly, with the reason and a legal layout."""
    for wrong in faults(r):
        raise ConfigError(f"layout: {wrong.problem}", fix(r))


def fix(r: Recipe) -> str:
    """Return the overrides that make the layout legal. Each alternative was tried and includes the further changes it needs."""
    first = next(faults(r))
    fixed = [changes for way in first.ways if (changes := completed(r, way)) is not None]
    texts = dict.fromkeys(map(typed, fixed))
    if texts:
        return f"write {', or '.join(texts)}"
    return first.otherwise or "leave the words of layout out, or write layout=auto"


def completed(r: Recipe, changes: Changes) -> Changes | None:
    """Return the changes plus the further changes that make the layout legal, or None if a few rounds do not suffice."""
    for _ in range(_ROUNDS):
        if (wrong := next(faults(changed(r, changes)), None)) is None:
            return {name: value for name, value in changes.items() if _value(r, name) != value}
        if not wrong.ways:
            return None
        # Prefer other degrees to other machines.
        changes = changes | min(wrong.ways, key=lambda way: any(name.startswith("cluster.") for name in way))
    return None


def changed(r: Recipe, changes: Changes) -> Recipe:
    """Return the recipe with these new values of options."""
    for name, value in changes.items():
        group, _, option = name.partition(".")
        r = replace(r, **{group: replace(getattr(r, group), **{option or "name": value})})
    return r


def typed(changes: Changes) -> str:
    """Return the changes as overrides of a command line."""

    def text(value: Any) -> str:
        return str(value.value if isinstance(value, Enum) else "null" if value is None else value).lower()

    return " ".join(f"{name}={text(value)}" for name, value in changes.items())


def _value(r: Recipe, name: str) -> Any:
    group, _, option = name.partition(".")
    return getattr(getattr(r, group), option or "name")


def faults(r: Recipe) -> Iterator[Wrong]:
    """Yield every rule that the layout breaks. Rules that no number of ranks satisfies come first."""
    yield from _divided(r.model, r.layout)
    yield from _stages(r.model, r.layout)
    yield from _grid(r)
    if r.model.experts:
        yield from _experts(r)
    for name in () if r.model.experts else ("ep", "etp"):
        if (degree := getattr(r.layout, name)) > 1:
            yield Wrong(f"{name} {degree} needs experts and {r.model.name} has none", ({f"layout.{name}": 1},))
    yield from _engine(r)


def _ranks(r: Recipe) -> str:
    c = r.cluster
    return f"{world_size(r)} ranks (cluster.nodes {c.nodes} x cluster.gpus_per_node {c.gpus_per_node})"


def _grid(r: Recipe) -> Iterator[Wrong]:
    p, world = r.layout, world_size(r)
    size = f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model_parallel(p)}"
    if world % model_parallel(p):
        if r.cluster.name == "local":
            more: Changes = {"cluster.gpus_per_node": model_parallel(p)}
        else:
            more = {"cluster.nodes": math.lcm(model_parallel(p), r.cluster.gpus_per_node) // r.cluster.gpus_per_node}
        smaller: Changes = {}
        for name in ("tp", "pp", "cp"):
            smaller[f"layout.{name}"] = degree = math.gcd(getattr(p, name), world)
            world //= degree
        yield Wrong(f"{size} does not divide {_ranks(r)}", (more, smaller))
    elif p.dp is not None and p.dp != data_parallel(r):
        yield Wrong(f"dp {p.dp} x {size} is not {_ranks(r)}", ({"layout.dp": data_parallel(r)},))


def _divided(m: Model, p: Layout) -> Iterator[Wrong]:
    counts = {
        "attention heads": m.heads, "key-value heads": m.kv_heads, "rows of the vocabulary": m.vocab,
        "columns of the MLP": m.ffn, "columns of the shared experts": m.shared_experts * m.expert_ffn,
    }  # fmt: skip
    for part, count in counts.items():
        if count % p.tp:
            yield Wrong(f"tp {p.tp} does not divide the {count} {part}", ({"layout.tp": divisor(count, p.tp)},))
    if p.sp and p.tp == 1:
        yield Wrong("sequence parallelism needs tensor parallelism", ({"layout.sp": False}, {"layout.tp": 2}))


def _stages(m: Model, p: Layout) -> Iterator[Wrong]:
    if p.vpp > 1 and p.pp == 1:
        yield Wrong(f"vpp {p.vpp} needs a pipeline", ({"layout.vpp": 1}, {"layout.pp": 2}))
    ends = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    if not ends:
        if m.layers % (p.pp * p.vpp):
            last = m.layers - -(-m.layers // p.pp) * (p.pp - 1)
            uneven: Changes = {"layout.vpp": 1, "layout.last_stage_layers": last}
            yield Wrong(
                f"pp {p.pp} x vpp {p.vpp} does not divide the {m.layers} layers",
                ({"layout.pp": divisor(m.layers, p.pp), "layout.vpp": 1}, *([uneven] if last > 0 and p.pp > 1 else [])),
            )
        return
    alike: Changes = {"layout.first_stage_layers": None, "layout.last_stage_layers": None}
    if p.vpp > 1:
        yield Wrong(f"stages of unlike size with vpp {p.vpp} are not supported", ({"layout.vpp": 1}, alike))
    if p.pp == 1:
        yield Wrong("layout.first_stage_layers and last_stage_layers need a pipeline", (alike, {"layout.pp": 2}))
        return
    left, middle = m.layers - sum(ends), p.pp - len(ends)
    if left < middle or (left % middle if middle else left):
        yield Wrong(
            f"first_stage_layers={p.first_stage_layers or 'null'} and last_stage_layers={p.last_stage_layers or 'null'} leave {left} "
            f"of {m.layers} layers to {middle} stages, which cannot share them equally",
            (alike,),
        )


def _experts(r: Recipe) -> Iterator[Wrong]:
    m, p, world = r.model, r.layout, world_size(r)
    if m.experts % p.ep:
        yield Wrong(f"ep {p.ep} does not divide the {m.experts} experts", ({"layout.ep": divisor(m.experts, p.ep)},))
    if m.expert_ffn % p.etp:
        yield Wrong(f"etp {p.etp} does not divide the expert FFN of {m.expert_ffn}", ({"layout.etp": 1},))
    if world % (p.ep * p.etp * p.pp):
        near = divisor(math.gcd(m.experts, max(1, world // p.pp)), p.ep)
        yield Wrong(
            f"ep {p.ep} x etp {p.etp} x pp {p.pp} does not divide {_ranks(r)}", ({"layout.ep": near, "layout.etp": 1},)
        )
    if p.tp > 1 and not p.sp:
        yield Wrong("experts under tensor parallelism need sequence parallelism", ({"layout.sp": True},))
    # Megatron's dispatcher uses an all-gather of uneven parts if the ranks that share an expert's columns have different
    # numbers of tokens. gloo does not have that operation.
    if r.cluster.name == "local" and p.etp > 1 and (p.ep > 1 or p.tp * p.cp % p.etp):
        yield Wrong(f"etp {p.etp} with ep {p.ep}, tp {p.tp} and cp {p.cp} does not run on gloo", ({"layout.etp": 1},))
    # Here Transformer Engine's grouped experts are reduced over all data-parallel ranks (megatron-core 0.16.1,
    # `extensions/transformer_engine.py`, `param.allreduce`). Measured on such experts, losses drift by 2e-3 to 4e-3.
    if r.engine.name is EngineName.slime and p.ep == 1 and p.etp != p.tp:
        yield Wrong(
            f"ep 1 with etp {p.etp} and tp {p.tp} trains wrongly without an error (expert gradients are reduced over the wrong "
            f"ranks)",
            ({"layout.etp": p.tp}, {"layout.ep": 2}),
        )


def _engine(r: Recipe) -> Iterator[Wrong]:
    p, embedded = r.layout, {"engine": EngineName.megatron}
    bf16: Changes = {"engine.dtype": Dtype.bf16}
    if r.engine.name is EngineName.slime and r.engine.dtype is Dtype.fp32:
        yield Wrong("engine.dtype fp32: Transformer Engine's flash attention has no fp32", (bf16,))
    if r.engine.name is EngineName.megatron:
        if r.engine.args:
            yield Wrong(
                f"engine.args.{next(iter(r.engine.args))} is a flag of slime's",
                otherwise="leave it out on the embedded engine",
            )
        if p.optimizer_state is OptimizerState.precision_aware:
            yield Wrong(
                "optimizer_state precision_aware is slime's with Transformer Engine",
                tuple({"layout.optimizer_state": s} for s in (OptimizerState.offloaded, OptimizerState.resident)),
            )
        if r.gpu.memory_mib and r.engine.dtype is Dtype.fp32:
            yield Wrong("engine.dtype fp32: flash attention on a GPU has no fp32", (bf16,))
        if r.gpu.memory_mib and p.cp > 1:
            # Zigzag chunks see keys before and after them. The embedded engine needs a mask of all pairs for that.
            more = divisor(math.gcd(r.model.kv_heads, r.cluster.gpus_per_node), p.tp * p.cp)
            yield Wrong(
                f"cp {p.cp} on GPUs needs engine=slime",
                ({"layout.cp": 1, "layout.tp": more}, {"engine": EngineName.slime}),
            )
        if p.offload and p.recompute not in (Recompute.linear, Recompute.full):
            yield Wrong(
                f"offload moves layers' inputs, and recompute {p.recompute.value} keeps more",
                ({"layout.recompute": Recompute.linear},),
            )
    elif p.recompute is Recompute.linear or p.offload:
        name = "offload" if p.offload else "recompute linear"
        yield Wrong(
            f"{name} is the embedded engine's",
            ({"layout.offload": False, "layout.recompute": Recompute.full}, embedded),
        )


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def divisor(count: int, limit: int) -> int:
    """Return the largest divisor of `count` that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if count % d == 0)
