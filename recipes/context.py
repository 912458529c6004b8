"""The check of sequence lengths against the context that a model's rotary positions cover."""

from recipes.config import Model, Rope
from recipes.errors import ConfigError


def reach(m: Model) -> int:
    """Return the longest sequence in tokens that the rotary positions cover."""
    return round(m.native_context * m.rope_factor)


def check_context(m: Model, longest: int) -> None:
    """Raise `ConfigError` if the longest sequence exceeds the context that `model.rope` allows. longest: in tokens."""
    covered = reach(m)
    if m.rope is Rope.unscaled or longest <= covered:
        return
    factor = -(-100 * longest // m.native_context) / 100
    scaled = f" times model.rope_factor {m.rope_factor:g}" if m.rope is Rope.yarn else ""
    raise ConfigError(
        f"the longest sequence has {longest:,} tokens, {m.name} reaches {covered:,} (model.native_context {m.native_context:,}"
        f"{scaled})",
        f"write model.rope=yarn model.rope_factor={factor:g}, or model.rope=unscaled as LIMI was released",
    )
