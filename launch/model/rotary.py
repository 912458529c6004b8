"""Rotary positions (arXiv 2104.09864), computed once for a micro-batch: every layer turns queries and keys by the same angles."""

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
    """cosine, sine: of every token and rotated pair, [t, 1, head_dim x rope_fraction / 2] fp32, with YaRN's magnitude in them."""

    cosine: Tensor
    sine: Tensor


def rotation(m: Model, positions: Tensor) -> Rotation:
    """positions [t]: of the tokens in their sequences."""
    frequencies = (yarn_frequencies(m) if m.rope is Rope.yarn else plain_frequencies(m)).to(positions.device)
    # 0.1 ln(factor) + 1: attention is sharper the longer the context (YaRN, equation 22).
    magnitude = 0.1 * math.log(m.rope_factor) + 1 if m.rope is Rope.yarn else 1.0
    angles = positions.float()[:, None, None] * frequencies
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)


def plain_frequencies(m: Model) -> Tensor:
    """Radians a position of each rotated pair, [head_dim x rope_fraction / 2] fp32."""
    return 1 / _periods(m)


def yarn_frequencies(m: Model) -> Tensor:
    """As `plain_frequencies`, by YaRN (arXiv 2309.00071), bit for bit as transformers has it.

    Megatron's `YarnRotaryEmbedding` rotates whole heads whatever the fraction.
    """
    rotated = int(m.head_dim * m.rope_fraction)
    low, high = _yarn_find_correction_range(32, 1, rotated, m.rope_base, m.native_context)
    periods = _periods(m)
    kept = 1 - _yarn_linear_ramp_mask(low, high, rotated // 2, periods.device)
    return 1 / (m.rope_factor * periods) * (1 - kept) + 1 / periods * kept


def _periods(m: Model) -> Tensor:
    rotated = int(m.head_dim * m.rope_fraction)
    return m.rope_base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x [t, heads, d], its first dimensions turned; of a pair, one number is in the first half of these and one in the second."""
    out: Tensor = _Rotate.apply(x, *by)
    return out


class _Rotate(torch.autograd.Function):
    """Keeps the angles alone, which all layers share: the gradient is turned back."""

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
    # Rounded to the model's precision first, as transformers does.
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    half = cosine.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
