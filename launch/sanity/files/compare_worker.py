"""What the workers of the file checks do: each reads a few tensors, an export's beside the base's, block by block.

A module of its own, as every worker imports it. Memory is that of a few blocks, whatever the tensor's size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.model.safetensors_file import Entry
from recipes.errors import CheckpointError

BLOCK = 1 << 17  # elements; a few of them fit a core's cache
PRINTS = 256  # elements of a tensor's fingerprint
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Stored:
    """A tensor's place on the disk."""

    path: Path
    entry: Entry


@dataclass(frozen=True)
class Pair:
    """A tensor of the export and, where there is one of its name and shape, the base's."""

    name: str
    new: Stored
    base: Stored | None

    @property
    def size(self) -> int:
        return self.new.entry.size


@dataclass(frozen=True)
class Reach:
    """What training can have done: `rates` the sum of the learning rates, `decay` the share of an element by which it may
    differ beside it (weight decay and rounding)."""

    rates: float
    decay: float


@dataclass(frozen=True)
class Prints:
    """The same few elements of a matrix: the export's, the base's, and the base's of a square one transposed."""

    new: np.ndarray
    base: np.ndarray
    turned: np.ndarray | None


@dataclass
class Beside:
    """A tensor against the base's. changed: elements that differ as bf16. beyond: the largest change less what `Reach.decay`
    allows of it. movable: elements whose bf16 value the sum of the rates can change. rounded: equal to the base rounded to bf16."""

    prints: Prints | None
    changed: int = 0
    largest: float = 0.0
    beyond: float = 0.0
    movable: int = 0
    equal: bool = True  # bit for bit
    rounded: bool = True
    zero: bool = True  # the base's


@dataclass
class Seen:
    name: str
    shape: tuple[int, ...]
    elements: int = 0
    not_finite: int = 0
    zero: bool = True
    base: Beside | None = None


def start() -> None:
    """Of a worker: blocks are small, and threads that wait for one another cost more than they bring."""
    torch.set_num_threads(1)


def look(reach: Reach, pairs: list[Pair]) -> list[Seen]:
    return [_look(reach, pair) for pair in pairs]


def _look(reach: Reach, pair: Pair) -> Seen:
    seen = Seen(pair.name, pair.new.entry.shape)
    if pair.base is not None:
        seen.base = Beside(_room(pair.new.entry.shape))
    olds = _blocks(pair.base) if pair.base else _blocks(pair.new)
    for new, old in zip(_blocks(pair.new), olds, strict=True):
        start, seen.elements = seen.elements, seen.elements + new.numel()
        finite = new.isfinite()
        seen.not_finite += new.numel() - int(finite.sum())
        seen.zero &= not bool(new.any())
        if seen.base is not None:
            _compare(seen.base, reach, new, old, finite)
            if seen.base.prints is not None:
                _print(seen.base.prints, pair.new.entry.shape, start, new, old)
    return seen


def _blocks(stored: Stored) -> Iterator[Tensor]:
    dtype = _DTYPES[stored.entry.dtype]
    left = stored.entry.size
    with stored.path.open("rb") as file:
        file.seek(stored.entry.start)
        while left:
            content = bytearray(min(left, BLOCK * dtype.itemsize))
            if file.readinto(content) != len(content):
                raise CheckpointError(f"'{stored.path}' ended while it was read", "copy it anew")
            left -= len(content)
            yield torch.frombuffer(content, dtype=dtype)


def _compare(found: Beside, reach: Reach, new: Tensor, old: Tensor, finite: Tensor) -> None:
    size = old.abs().float()
    found.zero &= not bool(size.any())
    # Half a unit in the last place of bf16 is 2**-8 of an element at most.
    found.movable += int((size < reach.rates * 2**8).sum())
    if new.dtype == old.dtype and torch.equal(_bits(new), _bits(old)):
        found.rounded &= old.dtype == torch.bfloat16 or torch.equal(old, old.bfloat16().to(old.dtype))
        return
    found.equal = False
    rounded = old.bfloat16()
    found.rounded &= torch.equal(new.float(), rounded.float())
    found.changed += int((_bits(new.bfloat16()) != _bits(rounded)).sum())
    change = (new.float() - old.float()).abs_().where(finite, torch.zeros(()))
    found.largest = max(found.largest, change.max().item())
    found.beyond = max(found.beyond, (change - reach.decay * size).max().item())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _room(shape: tuple[int, ...]) -> Prints | None:
    """Fingerprints to be filled in; vectors have none, as norms are all alike."""
    if len(shape) != 2 or not math.prod(shape):
        return None
    empty = np.zeros(PRINTS, np.float32)
    return Prints(empty, empty.copy(), empty.copy() if shape[0] == shape[1] else None)


def _print(prints: Prints, shape: tuple[int, ...], start: int, new: Tensor, old: Tensor) -> None:
    """Fills in the elements of a block. Tensors of a shape have theirs at the same places."""
    count = math.prod(shape)
    places = torch.randint(count, (PRINTS,), generator=torch.Generator().manual_seed(count))
    turned = places % shape[-1] * shape[-1] + places // shape[-1]  # of a square matrix
    for into, block, at in ((prints.new, new, places), (prints.base, old, places), (prints.turned, old, turned)):
        if into is None:
            continue
        here = (at >= start) & (at < start + block.numel())
        into[here.numpy()] = block[at[here] - start].float().nan_to_num_(0.0, 0.0, 0.0).numpy()
