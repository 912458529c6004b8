"""The rules of a parallel layout: what Megatron can run, and what it runs wrongly without an error.

World size = dp x tp x pp x cp. Experts are laid out on their own grid of the same ranks: edp x ep x etp x pp.
"""

import math
from collections.abc import Iterator

from recipes.config import Dtype, EngineName, Layout, Model, OptimizerState, Recipe, Recompute
from recipes.errors import ConfigError, Fault


def world_size(r: Recipe) -> int:
    """Ranks of the run, one a GPU (or a core)."""
    return r.cluster.nodes * r.cluster.gpus_per_node


def model_parallel(layout: Layout) -> int:
    """Ranks that together hold one copy of the model's activations: tp x pp x cp."""
    return layout.tp * layout.pp * layout.cp


def data_parallel(r: Recipe) -> int:
    """Ranks that see different sequences: world size / (tp x pp x cp)."""
    return world_size(r) // model_parallel(r.layout)


def sequence_multiple(layout: Layout) -> int:
    """A sequence is padded to this many tokens: zigzag context parallelism cuts it into 2 x cp chunks."""
    return 2 * layout.cp if layout.cp > 1 else 1


def batch_multiple(p: Layout, engine: EngineName) -> int:
    """A micro-batch is padded to this many tokens: sequence parallelism cuts each rank's share into tp parts, and slime pads
    a rank's share to 128 x tp."""
    if engine is EngineName.slime:
        return 128 * p.tp * p.cp
    return p.tp * sequence_multiple(p) if p.sp else sequence_multiple(p)


def micro_batch_multiple(layout: Layout) -> int:
    """A rank's micro-batches come in multiples of this: the interleaved pipeline schedule runs them pp at a time."""
    return layout.pp if layout.vpp > 1 else 1


def stage_layers(m: Model, p: Layout) -> list[list[range]]:
    """The layers of every pipeline stage, a range for each of its vpp chunks, numbered from 0. The layout is a legal one."""
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


def check_layout(r: Recipe) -> None:
    """Refuses a layout that cannot run, or that Megatron runs wrongly, with the reason and what to type instead."""
    for fault in faults(r):
        raise ConfigError(f"layout: {fault.problem}", fault.fix)


def faults(r: Recipe) -> Iterator[Fault]:
    """Everything that is wrong with the layout, the first first; the fix is the nearest legal value."""
    yield from _grid(r)
    yield from _divided(r.model, r.layout)
    yield from _stages(r.model, r.layout)
    if r.model.experts:
        yield from _experts(r)
    for name in () if r.model.experts else ("ep", "etp"):
        if (degree := getattr(r.layout, name)) > 1:
            yield Fault(f"{name} {degree} needs experts and {r.model.name} has none", f"write layout.{name}=1")
    yield from _engine(r)


def _ranks(r: Recipe) -> str:
    c = r.cluster
    return f"{world_size(r)} ranks (cluster.nodes {c.nodes} x cluster.gpus_per_node {c.gpus_per_node})"


def _grid(r: Recipe) -> Iterator[Fault]:
    p, world = r.layout, world_size(r)
    size = f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model_parallel(p)}"
    if world % model_parallel(p):
        local, needed = r.cluster.name == "local", math.lcm(model_parallel(p), r.cluster.gpus_per_node)
        more = (
            f"cluster.gpus_per_node={model_parallel(p)}"
            if local
            else f"cluster.nodes={needed // r.cluster.gpus_per_node}"
        )
        yield Fault(f"{size} does not divide {_ranks(r)}", f"write {more} or smaller degrees, or leave them out")
    elif p.dp is not None and p.dp != data_parallel(r):
        yield Fault(
            f"dp {p.dp} x {size} is not {_ranks(r)}", f"leave layout.dp out, or write layout.dp={data_parallel(r)}"
        )


def _divided(m: Model, p: Layout) -> Iterator[Fault]:
    counts = {
        "attention heads": m.heads, "key-value heads": m.kv_heads, "rows of the vocabulary": m.vocab,
        "columns of the MLP": m.ffn, "columns of the shared experts": m.shared_experts * m.expert_ffn,
    }  # fmt: skip
    for part, count in counts.items():
        if count % p.tp:
            yield Fault(f"tp {p.tp} does not divide the {count} {part}", f"write layout.tp={divisor(count, p.tp)}")
    if p.sp and p.tp == 1:
        yield Fault("sequence parallelism needs tensor parallelism", "write layout.sp=false or layout.tp=2")


def _stages(m: Model, p: Layout) -> Iterator[Fault]:
    if p.vpp > 1 and p.pp == 1:
        yield Fault(f"vpp {p.vpp} needs a pipeline", "write layout.vpp=1 or layout.pp=2")
    ends = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    if not ends:
        if m.layers % (p.pp * p.vpp):
            others = -(-m.layers // p.pp)
            last = m.layers - others * (p.pp - 1)
            uneven = f", or layout.vpp=1 layout.last_stage_layers={last}" if last > 0 and p.pp > 1 else ""
            yield Fault(
                f"pp {p.pp} x vpp {p.vpp} does not divide the {m.layers} layers",
                f"write layout.pp={divisor(m.layers, p.pp)} layout.vpp=1{uneven}",
            )
        return
    if p.vpp > 1:
        yield Fault(f"stages of unlike size with vpp {p.vpp} are not supported", "write layout.vpp=1")
    if p.pp == 1:
        yield Fault(
            "layout.first_stage_layers and last_stage_layers need a pipeline", "leave them out or write layout.pp=2"
        )
        return
    left, middle = m.layers - sum(ends), p.pp - len(ends)
    if left < middle or (left % middle if middle else left):
        yield Fault(
            f"first_stage_layers {p.first_stage_layers or 'alike'} and last_stage_layers {p.last_stage_layers or 'alike'} "
            f"leave {left} of {m.layers} layers to {middle} stages, which must be alike",
            "leave them out, or write layout=auto",
        )


def _experts(r: Recipe) -> Iterator[Fault]:
    m, p, world = r.model, r.layout, world_size(r)
    if m.experts % p.ep:
        yield Fault(f"ep {p.ep} does not divide the {m.experts} experts", f"write layout.ep={divisor(m.experts, p.ep)}")
    if m.expert_ffn % p.etp:
        yield Fault(f"etp {p.etp} does not divide the expert FFN of {m.expert_ffn}", "write layout.etp=1")
    if world % (p.ep * p.etp * p.pp):
        near = divisor(max(1, world // p.pp), p.ep)
        yield Fault(
            f"ep {p.ep} x etp {p.etp} x pp {p.pp} does not divide {_ranks(r)}", f"write layout.ep={near} layout.etp=1"
        )
    if p.tp > 1 and not p.sp:
        yield Fault("experts under tensor parallelism need sequence parallelism", "write layout.sp=true")
    # gloo has no all-gather of uneven parts, which Megatron's dispatcher uses where the ranks that share an expert's columns
    # have unlike numbers of tokens.
    if r.cluster.name == "local" and p.etp > 1 and (p.ep > 1 or p.tp * p.cp % p.etp):
        yield Fault(f"etp {p.etp} with ep {p.ep}, tp {p.tp} and cp {p.cp} does not run on gloo", "write layout.etp=1")
    # Transformer Engine's grouped experts are then reduced over all data-parallel ranks (megatron-core 0.16.1,
    # `extensions/transformer_engine.py`, `param.allreduce`); measured on such experts, losses drift by 2e-3 to 4e-3.
    if r.engine.name is EngineName.slime and p.ep == 1 and p.etp != p.tp:
        yield Fault(
            f"ep 1 with etp {p.etp} and tp {p.tp} trains wrongly without an error (expert gradients are reduced over the wrong "
            f"ranks)",
            f"write layout.etp={p.tp}, or layout.ep=2",
        )


def _engine(r: Recipe) -> Iterator[Fault]:
    p = r.layout
    if r.engine.name is EngineName.slime and r.engine.dtype is Dtype.fp32:
        yield Fault("engine.dtype fp32: Transformer Engine's flash attention has no fp32", "write engine.dtype=bf16")
    if p.optimizer_state is OptimizerState.precision_aware and r.engine.dtype is not Dtype.bf16:
        yield Fault(
            "optimizer_state precision_aware is for bf16 weights",
            "write layout.optimizer_state=resident or engine.dtype=bf16",
        )
    if r.engine.name is EngineName.megatron:
        if r.engine.args:
            yield Fault(
                f"engine.args.{next(iter(r.engine.args))} is a flag of slime's", "leave it out on the embedded engine"
            )
        if p.optimizer_state is OptimizerState.precision_aware:
            yield Fault(
                "optimizer_state precision_aware is slime's with Transformer Engine",
                "write layout.optimizer_state=offloaded, or resident",
            )
        if r.gpu.memory_mib and r.engine.dtype is Dtype.fp32:
            yield Fault("engine.dtype fp32: flash attention on a GPU has no fp32", "write engine.dtype=bf16")
        if r.gpu.memory_mib and p.cp > 1:
            # Zigzag chunks see keys before and after them, which here a mask of all pairs sorts out.
            more = divisor(math.gcd(r.model.kv_heads, r.cluster.gpus_per_node), p.tp * p.cp)
            yield Fault(f"cp {p.cp} on GPUs is slime's", f"write layout.cp=1 layout.tp={more}, or engine=slime")
        if p.offload and p.recompute not in (Recompute.linear, Recompute.full):
            yield Fault(
                f"offload moves layers' inputs, and recompute {p.recompute.value} keeps more",
                "write layout.recompute=linear",
            )
    elif p.recompute is Recompute.linear or p.offload:
        name = "offload" if p.offload else "recompute linear"
        yield Fault(
            f"{name} is the embedded engine's", "write layout.offload=false layout.recompute=full, or engine=megatron"
        )


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return -(-count // multiple) * multiple


def divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if count % d == 0)
