"""What both sides train: random weights by their Hugging Face names, and random tokens."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.weights.tiny import hf_config
from recipes.checkpoint.checkpoint_config import exported
from recipes.config import Dtype, Recipe
from recipes.families import facts

DRAWN = 2**24 + 43  # random numbers; a prime, so that no two rows of a weight begin alike
WARM_UP = 4096  # tokens of a sequence beside those that are timed, by which kernels are compiled and loaded


class RandomTokens:
    """Sequences as a packed data set gives them (`data_prep.pack.dataset.Dataset`), every token but the first supervised."""

    def __init__(self, lengths: Sequence[int], vocab: int) -> None:
        self.lengths, self._vocab = [*lengths], vocab

    def tokens(self, sequence: int) -> np.ndarray:
        """[length] int32"""
        drawn = np.random.default_rng(sequence).integers(0, self._vocab, self.lengths[sequence])
        return drawn.astype(np.int32)

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        return [(1, self.lengths[sequence])]


def device_here() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(r: Recipe) -> torch.dtype:
    return torch.bfloat16 if r.engine.dtype is Dtype.bf16 else torch.float32


def peer_config(r: Recipe) -> Any:
    """transformers' configuration of the recipe's model, its positions scaled where the recipe's are."""
    plain = hf_config(r.model, [{"content": t, "id": i} for i, t in enumerate(facts(r.model.family).tiny.special)])
    return type(plain)(**exported(r.model, plain.to_dict()))


def random_weights(r: Recipe, device: torch.device) -> Callable[[str], Tensor]:
    """Gives the tensor of a name: norms of ones, the rest normal of deviation 0.02. All are cut, each from a place of its own, from
    one row of numbers, which is drawn on the CPU and so the same on every device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {n: t.shape for n, t in AutoModelForCausalLM.from_config(peer_config(r)).state_dict().items()}

    row = torch.empty(DRAWN).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).to(device, dtype_of(r))

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if "norm" in name:
            return torch.ones(shape, device=device, dtype=dtype_of(r))
        begun = row.roll(zlib.crc32(name.encode()) % DRAWN)
        return begun.repeat(-(-shape.numel() // DRAWN))[: shape.numel()].view(shape)

    return read
