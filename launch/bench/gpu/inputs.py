"""The inputs of both engines that are compared: random weights under their Hugging Face names, and random tokens."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.weights.tiny import hf_config
from recipes.checkpoint import tensors
from recipes.checkpoint.checkpoint_config import exported
from recipes.config import Dtype, Recipe
from recipes.families import facts

DRAWN = 2**24 + 43  # random numbers drawn; a prime, so that no two rows of a weight start with the same numbers
WARM_UP = 8192  # tokens of an extra sequence, not timed, that makes kernels compile and load, as many as compile for long ones


class RandomTokens:
    """Random sequences with the interface of a packed data set (`data_prep.pack.dataset.Dataset`). Every token but the first is
    supervised."""

    def __init__(self, lengths: Sequence[int], vocab: int) -> None:
        self.lengths, self._vocab = [*lengths], vocab

    def tokens(self, sequence: int) -> np.ndarray:
        """Return the tokens of a sequence, [length] int32."""
        drawn = np.random.default_rng(sequence).integers(0, self._vocab, self.lengths[sequence])
        return drawn.astype(np.int32)

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """Return the supervised spans of a sequence."""
        return [(1, self.lengths[sequence])]


def device_here() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(r: Recipe) -> torch.dtype:
    """Return the dtype in which the recipe trains."""
    return torch.bfloat16 if r.engine.dtype is Dtype.bf16 else torch.float32


def peer_config(r: Recipe) -> Any:
    """Return transformers' configuration of the recipe's model, with the recipe's scaling of positions."""
    plain = hf_config(r.model, [{"content": t, "id": i} for i, t in enumerate(facts(r.model.family).tiny.special)])
    return type(plain)(**exported(r.model, plain.to_dict()))


def random_weights(r: Recipe, device: torch.device) -> Callable[[str], Tensor]:
    """Return a function that maps a Hugging Face name to its weight: ones for norms, otherwise normal with standard deviation 0.02.

    Every weight is cut from one row of random numbers, each from a different offset. The row is drawn on the CPU, so it is the same
    on every device.
    """
    shapes = tensors.trained(r.model)
    row = torch.empty(DRAWN).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).to(device, dtype_of(r))

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if "norm" in name:
            return torch.ones(shape, device=device, dtype=dtype_of(r))
        shifted = row.roll(zlib.crc32(name.encode()) % DRAWN)
        size = math.prod(shape)
        return shifted.repeat(-(-size // DRAWN))[:size].view(shape)

    return read
