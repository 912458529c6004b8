"""Run by the Python that slime runs in, `yarn_tables.py RUN_FOLDER`: Megatron-LM's own rotary code on a packed query of ones, with
what `launch.slime.hooks.yarn` sets, beside transformers' cosines and sines. Prints the largest differences, as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from launch.slime.hooks import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core.models.common.embeddings import RotaryEmbedding, rope_utils  # noqa: E402
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (  # noqa: E402
    _yarn_get_concentration_factor_from_config,
)
from transformers import Qwen3Config  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding  # noqa: E402

from launch.slime.hooks import yarn  # noqa: E402
from recipes.compose.recipe import from_yaml  # noqa: E402

run = Path(sys.argv[1])
m = from_yaml(run / "config.yaml").model
length = round(m.native_context * m.rope_factor)
config = SimpleNamespace(
    apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False, mrope_interleaved=False
)
embedding = RotaryEmbedding(
    m.head_dim, rotary_percent=m.rope_fraction, rotary_base=m.rope_base, use_cpu_initialization=True, cp_group=None
)
yarn.scale(SimpleNamespace(config=config, rotary_pos_emb=embedding), run)
positions = embedding(length)
rotated = positions.shape[-1]
scale = _yarn_get_concentration_factor_from_config(config)


def turned(first: float, second: float) -> torch.Tensor:
    """[length, rotated] of a query whose halves are these numbers."""
    query = torch.cat([torch.full((rotated // 2,), first), torch.full((rotated // 2,), second)]).repeat(length, 1, 1, 1)
    return rope_utils._apply_rotary_pos_emb_bshd(query, positions, mscale=scale)[:, 0, 0]


# (1, 0) turns into (cos, sin).
out = turned(1.0, 0.0)
cos, sin = out[:, : rotated // 2], out[:, rotated // 2 :]
rope = {
    "rope_type": "yarn", "rope_theta": m.rope_base, "factor": m.rope_factor,
    "original_max_position_embeddings": m.native_context,
}  # fmt: skip
theirs = Qwen3RotaryEmbedding(
    Qwen3Config(head_dim=rotated, rope_parameters=rope, max_position_embeddings=m.max_position)
)
their_cos, their_sin = theirs(torch.ones(1), torch.arange(length)[None])
half = rotated // 2
print(
    json.dumps(
        {
            "cos": float((cos - their_cos[0, :, :half]).abs().max()),
            "sin": float((sin - their_sin[0, :, :half]).abs().max()),
            "scale": abs(scale - theirs.attention_scaling),
            "length": length,
        }
    )
)
