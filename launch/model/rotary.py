"""Rotary position embeddings (arXiv 2104.09864). The angles are computed once per micro-batch, because every layer uses the same."""

import math
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_linear_ramp_mask,
)
from torch import Tensor

from launch.model.compiled import fused
from recipes.config import Model, Rope


class Rotation(NamedTuple):
    """Cosine and sine of every token and rotated pair, [t, 1, head_dim x rope_fraction / 2] fp32, multiplied by YaRN's magnitude."""

    cosine: Tensor
    sine: Tensor


def rotation(m: Model, positions: Tensor) -> Rotation:
    """Return the rotation of tokens by their positions: [t], each token's position in its sequence."""
    frequencies = (yarn_frequencies(m) if m.rope is Rope.yarn else plain_frequencies(m)).to(positions.device)
    # 0.1 ln(factor) + 1 makes attention sharper as the context grows (YaRN, equation 22).
    magnitude = 0.1 * math.log(m.rope_factor) + 1 if m.rope is Rope.yarn else 1.0
    angles = positions.float()[:, None, None] * frequencies
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def plain_frequencies(m: Model) -> Tensor:
    """Return the radians per position of each rotated pair, [head_dim x rope_fraction / 2] fp32."""
    return 1 / _periods(m)


def yarn_frequencies(m: Model) -> Tensor:
    """Return YaRN's frequencies (arXiv 2309.00071) in the shape of `plain_frequencies`, equal to transformers' bit for bit.

    Megatron's `YarnRotaryEmbedding` is not used: it ignores the fraction and rotates whole heads.
    """
    rotated = int(m.head_dim * m.rope_fraction)
    low, high = _yarn_find_correction_range(32, 1, rotated, m.rope_base, m.native_context)
    periods = _periods(m)
    # Share of the plain frequency in each pair; the rest is the frequency divided by the factor.
    plain_share = 1 - _yarn_linear_ramp_mask(low, high, rotated // 2, periods.device)
    return 1 / (m.rope_factor * periods) * (1 - plain_share) + 1 / periods * plain_share


def _periods(m: Model) -> Tensor:
    rotated = int(m.head_dim * m.rope_fraction)
    return m.rope_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the first head dimensions of x [t, heads, d] and return the same shape. Each pair has one number in the first half of
    the rotated dimensions and one in the second half."""
    out: Tensor = _Rotate.apply(x, *by)
    return out


class _Rotate(torch.autograd.Function):
    """Rotation that saves only the angles, which all layers share. The backward pass rotates the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, -sine), None, None


@fused
def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # Round the angles to the model's precision first, as transformers does.
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    half = cosine.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
