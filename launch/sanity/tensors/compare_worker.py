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

from launch.sanity.tensors.digests import Digest, Sums
from launch.sanity.tensors.prints import Prints, Taker, Wanted
from launch.weights.safetensors_file import Entry
from recipes.errors import CheckpointError

BLOCK = 1 << 17  # elements, or one row; a few blocks fit a core's cache
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Stored:
    """A tensor's place on the disk."""

    path: Path
    entry: Entry


@dataclass(frozen=True)
class Pair:
    """A tensor of the export and, where there is one of its name and shape, the base's, with what is taken of both."""

    name: str
    new: Stored
    base: Stored | None
    wanted: Wanted

    @property
    def size(self) -> int:
        return self.new.entry.size


@dataclass(frozen=True)
class Reach:
    """What training can have done: `rates` the sum of the learning rates, `decay` the share of an element by which it may
    differ beside it (weight decay and rounding)."""

    rates: float
    decay: float


@dataclass
class Beside:
    """A tensor against the base's. changed: elements that differ as bf16. beyond: the largest change less what `Reach.decay`
    allows of it. movable: elements whose bf16 value the sum of the rates can change. rounded: equal to the base rounded to bf16."""

    prints: Prints | None = None
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
    digest: Digest | None = None  # where it is to be compared with the trainer's
    elements: int = 0
    not_finite: int = 0
    zero: bool = True
    base: Beside | None = None


def start() -> None:
    """Of a worker: blocks are small, and threads that wait for one another cost more than they bring."""
    torch.set_num_threads(1)


def look(reach: Reach, digested: bool, pairs: list[Pair]) -> list[Seen]:
    """digested: whether the digests are asked for."""
    return [_look(reach, digested, pair) for pair in pairs]


def _look(reach: Reach, digested: bool, pair: Pair) -> Seen:
    shape = pair.new.entry.shape
    seen, row = Seen(pair.name, shape), math.prod(shape[1:])
    taker = Taker(shape, pair.wanted) if pair.base and math.prod(shape) else None
    sums = Sums(shape) if digested and shape else None
    seen.base = Beside() if pair.base else None
    olds = _blocks(pair.base) if pair.base else _blocks(pair.new)
    for new, old in zip(_blocks(pair.new), olds, strict=True):
        start, seen.elements = seen.elements, seen.elements + new.numel()
        finite = new.isfinite()
        seen.not_finite += new.numel() - int(finite.sum())
        seen.zero &= not bool(new.any())
        if seen.base is not None:
            _compare(seen.base, reach, new, old, finite)
        if taker is not None:
            taker.add(new, old, start)
        if sums is not None:
            sums.add(new.view(-1, row), np.arange(start // row, seen.elements // row))
    if seen.base is not None and taker is not None:
        seen.base.prints = taker.prints()
    if sums is not None:
        seen.digest = sums.digest()
    return seen


def _blocks(stored: Stored) -> Iterator[Tensor]:
    """Of whole rows."""
    dtype = DTYPES[stored.entry.dtype]
    row = math.prod(stored.entry.shape[1:])
    size = row * max(1, BLOCK // max(1, row)) * dtype.itemsize
    left = stored.entry.size
    with stored.path.open("rb") as file:
        file.seek(stored.entry.start)
        while left:
            content = bytearray(min(left, size))
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
