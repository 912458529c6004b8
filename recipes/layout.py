"""The rules of a parallel layout: what Megatron can run, and what it runs wrongly without an error.

World size = dp x tp x pp x cp. Experts are laid out on their own grid of the same ranks: edp x ep x etp x pp.
"""

from recipes.config import Layout, Recipe, Recompute
from recipes.errors import ConfigError


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


def batch_multiple(layout: Layout) -> int:
    """A micro-batch is padded to this many tokens: sequence parallelism cuts each rank's share into tp parts."""
    return layout.tp * sequence_multiple(layout) if layout.sp else sequence_multiple(layout)


def micro_batch_multiple(layout: Layout) -> int:
    """A rank's micro-batches come in multiples of this: the interleaved pipeline schedule runs them pp at a time."""
    return layout.pp if layout.vpp > 1 else 1


def check_layout(r: Recipe) -> None:
    """Refuses a layout that cannot run, or that Megatron runs wrongly, with the reason and what to type instead."""
    m, p, world = r.model, r.layout, world_size(r)
    size = f"tp {p.tp} x pp {p.pp} x cp {p.cp} = {model_parallel(p)}"
    ranks = f"{world} ranks (cluster.nodes {r.cluster.nodes} x cluster.gpus_per_node {r.cluster.gpus_per_node})"

    def refuse(wrong: bool, message: str) -> None:
        if wrong:
            raise ConfigError(f"layout: {message}")

    refuse(
        world % model_parallel(p) != 0,
        f"{size} does not divide {ranks}; write cluster.gpus_per_node={model_parallel(p)} or smaller degrees",
    )
    refuse(
        p.dp is not None and p.dp != data_parallel(r),
        f"dp {p.dp} x {size} is not {ranks}; leave layout.dp out, or write layout.dp={data_parallel(r)}",
    )
    for part, count in (
        ("attention heads", m.heads),
        ("key-value heads", m.kv_heads),
        ("rows of the vocabulary", m.vocab),
    ):
        refuse(
            count % p.tp != 0, f"tp {p.tp} does not divide the {count} {part}; write layout.tp={_divisor(count, p.tp)}"
        )
    refuse(p.sp and p.tp == 1, "sequence parallelism needs tensor parallelism; write layout.sp=false or layout.tp=2")
    refuse(p.vpp > 1 and p.pp == 1, f"vpp {p.vpp} needs a pipeline; write layout.vpp=1 or layout.pp=2")
    stages = p.pp * p.vpp
    refuse(
        m.layers % stages != 0,
        f"pp {p.pp} x vpp {p.vpp} does not divide the {m.layers} layers; write layout.pp={_divisor(m.layers, p.pp)} "
        "layout.vpp=1",
    )
    if m.experts == 0:
        refuse(p.ep > 1, f"ep {p.ep} needs experts and {m.name} has none; write layout.ep=1")
        refuse(p.etp > 1, f"etp {p.etp} needs experts and {m.name} has none; write layout.etp=1")
        return
    refuse(
        m.experts % p.ep != 0,
        f"ep {p.ep} does not divide the {m.experts} experts; write layout.ep={_divisor(m.experts, p.ep)}",
    )
    refuse(
        m.expert_ffn % p.etp != 0, f"etp {p.etp} does not divide the expert FFN of {m.expert_ffn}; write layout.etp=1"
    )
    refuse(
        world % (p.ep * p.etp * p.pp) != 0,
        f"ep {p.ep} x etp {p.etp} x pp {p.pp} does not divide {ranks}; write layout.ep={_divisor(world // p.pp, p.ep)} layout.etp=1",
    )
    refuse(p.tp > 1 and not p.sp, "experts under tensor parallelism need sequence parallelism; write layout.sp=true")
    # Measured on megatron-core 0.16.1: losses drift by 2.5e-3, expert gradients are not reduced over expert-DP.
    refuse(
        p.tp > 1 and p.ep == 1 and p.etp == 1,
        f"tp {p.tp} with ep 1 and etp 1 trains wrongly without an error (expert gradients are not reduced); write layout.ep={p.tp}",
    )
    # gloo has no all-gather of uneven parts, which Megatron's dispatcher uses here.
    refuse(
        r.cluster.name == "local" and p.etp > 1 and p.ep > 1 and data_parallel(r) > 1,
        f"etp {p.etp} with ep {p.ep} and dp {data_parallel(r)} does not run on gloo; write layout.etp=1",
    )
    refuse(
        p.recompute is Recompute.selective and r.cluster.name == "local",
        "selective recompute is not proved on this machine; write layout.recompute=full or none",
    )


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least `count`."""
    return -(-count // multiple) * multiple


def _divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if count % d == 0)
