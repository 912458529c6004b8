"""A tensor's position in the model, by its name."""

from dataclasses import dataclass

from recipes.checkpoint.tensors import is_mtp
from recipes.config import Model

ROUTER_BIAS, MTP, NORM = "router bias", "MTP", "norm"


@dataclass(frozen=True)
class Place:
    """A tensor's kind, layer and expert. layer: None outside the layers. expert: None if it is no routed expert's."""

    kind: str
    layer: int | None
    expert: int | None = None


def place(name: str, m: Model) -> Place:
    """Return the position of an export's tensor."""
    words = name.split(".")
    layer = int(words[2]) if words[:2] == ["model", "layers"] else None
    expert = int(words[words.index("experts") + 1]) if "experts" in words else None
    if is_mtp(name, m):
        return Place(MTP, layer)
    if layer is None and "norm" not in words:
        return Place("lm_head" if words[0] == "lm_head" else "embedding", None)
    return Place(_kind(words), layer, expert)


def _kind(words: list[str]) -> str:
    if words[-1] == "e_score_correction_bias":
        return ROUTER_BIAS
    if "norm" in words[-2]:
        return NORM
    if words[-3:-1] == ["mlp", "gate"]:
        return "router"
    group = next((g for g in ("shared_experts", "experts", "mlp") if g in words), "").replace("_", " ")
    return f"{group} {words[-2].removesuffix('_proj')}".strip()
