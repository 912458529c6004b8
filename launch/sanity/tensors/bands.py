"""Bands: the parts of a tensor that a faulty export may reorder as a whole, i.e. heads and tensor-parallel shards."""

from dataclasses import dataclass

from launch.sanity.tensors.tensor_place import place
from recipes.config import Model

_PARTS = 8  # bands of a tensor that tensor parallelism splits: the GPUs of a node


@dataclass(frozen=True)
class Bands:
    """Equal parts of a tensor along an axis (0: rows).

    part: what one part is called. family: tensors of one family are slices of one fused tensor, so that their parts may be mixed
    up. head: rows of a head. turned: rows of each head that rotary positions rotate in pairs.
    """

    count: int
    axis: int
    part: str
    family: str
    head: int = 0
    turned: int = 0


def bands(name: str, shape: tuple[int, ...], m: Model) -> Bands:
    """Return the bands of an export's tensor; a single band if it has no such parts."""
    kind = place(name, m).kind
    owner, last, ends = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", "")
    group, _, of = kind.rpartition(" ")
    turned = int(m.head_dim * m.rope_fraction)
    if not group and of in ("q", "k", "v"):
        return Bands(
            m.heads if of == "q" else m.kv_heads, 0, "head", f"{owner}.qkv.{ends}", m.head_dim, turned * (of != "v")
        )
    if last in ("q_norm", "k_norm"):
        return Bands(1, 0, "", name, m.head_dim, turned)
    if group and of in ("gate", "up"):
        return Bands(_even(shape[0]), 0, "part", f"{owner}.{ends}")
    known = {
        "o": lambda: Bands(m.heads, 1, "head", name),
        "router": lambda: Bands(shape[0], 0, "expert", name),
        "embedding": lambda: Bands(_even(shape[0]), 0, "part", name),
        "lm_head": lambda: Bands(_even(shape[0]), 0, "part", name),
        "down": lambda: Bands(_even(shape[1]), 1, "part", name),
    }
    return known[of]() if of in known and len(shape) == 2 else Bands(1, 0, "", name)


def _even(length: int) -> int:
    return _PARTS if length % _PARTS == 0 else 1
